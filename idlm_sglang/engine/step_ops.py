"""What turns kept drafts into rows, and logits into tokens: plain torch (`idlm_sglang.isd`), or the Triton kernels (`idlm_kernels`).

Around the forward there is one path, with everything a request adds to its logits. A strided step, the first drafts behind a prompt, and the
sampler of prefill and stride 1 call the same ops: the two kinds round scores differently in the last bits, and a seeded request must not meet both.
"""

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

import torch

from idlm_sglang.config import AUTO, TORCH, TRITON, SettingError
from idlm_sglang.engine.masks import hide
from idlm_sglang.engine.state import Carried
from idlm_sglang.engine.step_inputs import Adjust, Layout, Requests, StepInputs, load
from idlm_sglang.isd import BRANCH, SamplingRows, StepOutcome, first_proposal, isd_step, target_scores
from idlm_sglang.isd.noise import NoiseAhead
from idlm_sglang.isd.parts import in_parts
from idlm_sglang.isd.propose import Proposal
from idlm_sglang.isd.target import choice

logger = logging.getLogger(__name__)

# What `auto` is on a CUDA GPU. The kernels have never run on one, and a wrong kernel would cost exactness, not only time. It becomes
# TRITON when the row "the Triton kernels pass their tests compiled" of docs/gpu-validation.md, and the rows it names, have passed.
AUTO_ON_CUDA = TORCH


# What becomes of drafts between their draw and the slots (`engine.ranks`).
Agree = Callable[[Proposal], Proposal]


def _as_drawn(proposal: Proposal) -> Proposal:
    return proposal


class StepOps(Protocol):
    """Shapes as in `idlm_sglang.isd`: B requests, K drafts, W = 2K + 1 rows, V tokens."""

    def load(self, requests: Requests, layout: Layout, any_rejection: bool, adjust: Adjust | None = None) -> StepInputs:
        """What the slots keep for the requests, laid out as rows. ``any_rejection``: some request uses the rejection rule.

        ``adjust`` is handed the drafts, and the rows are made of those that it returns.
        """

    def hide(self, buffer: torch.Tensor, counts: torch.Tensor, forks: torch.Tensor, lengths: torch.Tensor, width: int) -> None:
        """`engine.masks.hide`."""

    def step(self, logits: torch.Tensor, requests: Requests, inputs: StepInputs, sampling: SamplingRows, salvage: bool) -> StepOutcome:
        """`isd.isd_step` on the drafts of ``inputs``; the next ones' q may be in the slots already, and not in the proposal."""

    def store(self, requests: Requests, inputs: StepInputs, step: StepOutcome) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep a step's next drafts under the requests' new lengths.

        Returns these ``(B,)``, and the step's figures ``(B, 4)`` float32 (`spec_io.IsdResult`).
        """

    def first(self, logits: torch.Tensor, requests: Requests, sampling: SamplingRows, sure: bool = False, agree: Agree = _as_drawn) -> Proposal:
        """`isd.first_proposal`, kept in the slots as ``agree`` returns it. ``sure``: with how sure the drafts are, which the kernels do not say."""

    def keep(self, logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
        """What :meth:`draw` and :meth:`probabilities` need of ``logits`` ``(B, 1, V)`` float32, which the caller then overwrites."""

    def draw(self, kept: torch.Tensor, rows: SamplingRows, positions: torch.Tensor) -> torch.Tensor:
        """``(B,)`` int64: the token of each row, by the coupled rule. ``positions`` ``(B,)`` integer, of the rows."""

    def probabilities(self, kept: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
        """``(B, V)`` float32: what the tokens are drawn from."""


class TorchOps:
    """Plain torch, on any device."""

    def __init__(self):
        self._noise = NoiseAhead()

    def load(self, requests, layout, any_rejection, adjust=None) -> StepInputs:
        return load(requests, layout, any_rejection, adjust)

    def hide(self, buffer, counts, forks, lengths, width) -> None:
        hide(buffer, counts, forks, lengths, width)

    def step(self, logits, requests, inputs, sampling, salvage) -> StepOutcome:
        carried, tables = inputs.carried, requests.state.tables(logits.shape[1] // 2)
        # Where all are greedy little more than the logits is needed.
        some = in_parts if sampling.any_sampled else lambda step, *args: step(*args)
        return some(
            isd_step, logits, carried.drafts, carried.counts, carried.log_q, carried.q, requests.limits, requests.seq_lens, sampling, inputs.forks, salvage, tables, inputs.masks
        )

    def store(self, requests, inputs, step) -> tuple[torch.Tensor, torch.Tensor]:
        lengths, carried = requests.seq_lens + step.accept_lens, inputs.carried
        requests.state.store(requests.slots, requests.numbers, lengths, step.proposal)
        return lengths, torch.stack([carried.counts, step.deciding, step.introspection, carried.clean], dim=1)

    def first(self, logits, requests, sampling, sure=False, agree=_as_drawn) -> Proposal:
        proposal = agree(in_parts(first_proposal, logits, requests.limits, requests.seq_lens, sampling, sure))
        requests.state.store(requests.slots, requests.numbers, requests.seq_lens, proposal)
        return proposal

    def keep(self, logits, rows) -> torch.Tensor:
        return target_scores(logits, rows)[:, 0]

    def draw(self, kept, rows, positions) -> torch.Tensor:
        return choice(kept[:, None], rows, self._noise.of(rows.seed, positions, kept.shape[-1]))[:, 0]

    def probabilities(self, kept, rows) -> torch.Tensor:
        return torch.softmax(kept, dim=-1)


class TritonOps:
    """The kernels: compiled on a CUDA GPU, or interpreted on the host under ``TRITON_INTERPRET=1``. q stays in its slots."""

    def __init__(self):
        from idlm_kernels import masks, rows, slots, step

        self._masks, self._rows, self._slots, self._step = masks, rows, slots, step
        if interpreted():
            logger.warning("idlm: IDLM_STEP_OPS=%s under TRITON_INTERPRET=1: kernels are interpreted on the host, slowly, for tests", TRITON)

    def load(self, requests, layout, any_rejection, adjust=None) -> StepInputs:
        inputs = self._load(requests, layout)
        if adjust is None or (carried := adjust(inputs.carried)) is inputs.carried:
            return inputs
        # The slots take the changed drafts, under the same stamp: so the same kernel lays these out.
        self._keep(requests, carried.drafts, carried.counts, carried.clean, carried.log_q)
        return self._load(requests, layout)

    def hide(self, buffer, counts, forks, lengths, width) -> None:
        self._masks.hide(buffer, counts, forks, lengths, width)

    def _load(self, requests, layout) -> StepInputs:
        made = self._slots.load(
            requests.state, requests.slots, requests.numbers, requests.seq_lens, requests.limits, layout.pending, layout.k, layout.table, layout.mask_id,
            layout.last_position, layout.salvage == BRANCH,
        )  # fmt: skip
        carried = Carried(made.drafts, made.counts, made.log_q, None, made.clean)
        return StepInputs(carried, made.forks, made.tokens, made.rotary, made.kv_slots, (made.index, made.positions))

    def step(self, logits, requests, inputs, sampling, salvage) -> StepOutcome:
        read, carried, q = self._rows.Rows(logits, *inputs.read), inputs.carried, requests.state.q
        out, _ = self._step.isd_step(
            read, sampling, carried.drafts, carried.counts, carried.log_q, requests.limits, q, requests.slots, inputs.forks, salvage
        )
        proposal = Proposal(out.drafts, out.counts, out.log_q, None, out.clean)
        return StepOutcome(out.tokens, out.accept_lens, out.last, proposal, out.introspection, out.deciding)

    def store(self, requests, inputs, step) -> tuple[torch.Tensor, torch.Tensor]:
        carried = inputs.carried
        verified = self._slots.Round(carried.counts, carried.clean, step.accept_lens, step.introspection)
        next_ = step.proposal
        return self._keep(requests, next_.drafts, next_.counts, next_.clean, next_.log_q, verified)

    def first(self, logits, requests, sampling, sure=False, agree=_as_drawn) -> Proposal:
        draws = self._step.first_drafts(self._plain(logits, requests.seq_lens), sampling, requests.state.q, requests.slots)
        counts = requests.limits.to(torch.int64).clamp(max=logits.shape[1])
        proposal = agree(Proposal(draws.tokens, counts, draws.log_p, None, counts))
        self._keep(requests, proposal.drafts, proposal.counts, proposal.clean, proposal.log_q)
        return proposal

    def _keep(self, requests, *drafts):
        return self._slots.store(requests.state, requests.slots, requests.numbers, requests.seq_lens, *drafts)

    def keep(self, logits, rows) -> torch.Tensor:
        return logits.clone()

    def draw(self, kept, rows, positions) -> torch.Tensor:
        return self._step.draw(self._plain(kept, positions), rows).tokens[:, 0]

    def probabilities(self, kept, rows) -> torch.Tensor:
        # Written by the kernel that writes q: another device function's exp would put the edge of a support elsewhere.
        by_q = replace(rows, coupled=torch.zeros_like(rows.coupled), any_rejection=True)
        out = torch.softmax(kept, dim=-1)
        self._step.first_drafts(self._plain(kept, torch.zeros_like(rows.seed)), by_q, out, torch.arange(len(out), device=out.device))
        return out[:, 0]

    def _plain(self, logits: torch.Tensor, first_positions: torch.Tensor):
        """Rows that are all read, at consecutive positions."""
        return self._rows.Rows(logits, *self._rows.plain_rows(first_positions, logits.shape[1]))


_KINDS = {TORCH: TorchOps, TRITON: TritonOps}


@lru_cache
def step_ops(name: str) -> StepOps:
    """``torch`` or ``triton``, as :func:`resolve_step_ops` says; one of each in a process."""
    return _KINDS[name]()


def interpreted() -> bool:
    """Whether Triton runs kernels on the host."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve_step_ops(setting: str, device: str | None) -> str:
    """``torch`` or ``triton`` for ``IDLM_STEP_OPS``; :class:`SettingError` for kernels that cannot run here.

    ``device``: SGLang's, None where it has not been chosen yet.
    """
    on_cuda = torch.version.cuda is not None and torch.cuda.is_available() and str(device or "cuda").startswith("cuda")
    if setting == AUTO:
        return AUTO_ON_CUDA if on_cuda else TORCH
    if setting == TRITON:
        if importlib.util.find_spec("triton") is None:
            raise SettingError(f"IDLM_STEP_OPS={TRITON} needs Triton, which is not installed; allowed: {AUTO}, {TORCH}")
        if not on_cuda and not interpreted():
            allowed = f"{AUTO}, {TORCH}, or TRITON_INTERPRET=1 for tests"
            raise SettingError(f"IDLM_STEP_OPS={TRITON} needs a CUDA GPU, and this server runs without one; allowed: {allowed}")
    return setting
