"""What turns logits into tokens: plain torch (`idlm_sglang.isd`), or the Triton kernels (`idlm_kernels`).

One path leads up to the logits with everything a request adds to them, and one goes on behind the tokens. Between them a strided step, the first
drafts behind a prompt, and the sampler of prefill and stride 1 call the same ops: the two kinds round scores differently in the
last bits, and a seeded request must not meet both.
"""

import importlib.util
import logging
import os
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

import torch

from idlm_sglang.config import AUTO, TORCH, TRITON, SettingError
from idlm_sglang.engine.state import Carried, SlotState
from idlm_sglang.isd import SamplingRows, StepOutcome, first_proposal, isd_step, target_scores
from idlm_sglang.isd.noise import NoiseAhead
from idlm_sglang.isd.propose import Proposal
from idlm_sglang.isd.target import choice

logger = logging.getLogger(__name__)

# What `auto` is on a CUDA GPU. The kernels have never run on one, and a wrong kernel would cost exactness, not only time. It becomes
# TRITON when the row "the Triton kernels pass their tests compiled" of docs/gpu-validation.md, and the rows it names, have passed.
AUTO_ON_CUDA = TORCH


class StepOps(Protocol):
    """Shapes as in `idlm_sglang.isd`: B requests, K drafts, V tokens.

    Attributes:
        q_stays_in_slots: the drafts' q is read and written where ``state`` keeps it; otherwise it is in ``carried`` and in the proposal.
    """

    q_stays_in_slots: bool

    def step(
        self, logits: torch.Tensor, carried: Carried, limits: torch.Tensor, seq_lens: torch.Tensor, rows: SamplingRows,
        forks: torch.Tensor, salvage: bool, state: SlotState, slots: torch.Tensor,
    ) -> StepOutcome:  # fmt: skip
        """`isd.isd_step` on the drafts ``carried``; ``slots`` ``(B,)`` int64."""

    def first(
        self, logits: torch.Tensor, limits: torch.Tensor, seq_lens: torch.Tensor, rows: SamplingRows, state: SlotState, slots: torch.Tensor
    ) -> Proposal:  # fmt: skip
        """`isd.first_proposal`."""

    def keep(self, logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
        """What :meth:`draw` and :meth:`probabilities` need of ``logits`` ``(B, 1, V)`` float32, which the caller then overwrites."""

    def draw(self, kept: torch.Tensor, rows: SamplingRows, positions: torch.Tensor) -> torch.Tensor:
        """``(B,)`` int64: the token of each row, by the coupled rule. ``positions`` ``(B,)`` integer, of the rows."""

    def probabilities(self, kept: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
        """``(B, V)`` float32: what the tokens are drawn from."""


class TorchOps:
    """Plain torch, on any device."""

    q_stays_in_slots = False

    def __init__(self):
        self._noise = NoiseAhead()

    def step(self, logits, carried, limits, seq_lens, rows, forks, salvage, state, slots) -> StepOutcome:
        return isd_step(logits, carried.drafts, carried.counts, carried.log_q, carried.q, limits, seq_lens, rows, forks, salvage)

    def first(self, logits, limits, seq_lens, rows, state, slots) -> Proposal:
        return first_proposal(logits, limits, seq_lens, rows)

    def keep(self, logits, rows) -> torch.Tensor:
        return target_scores(logits, rows)[:, 0]

    def draw(self, kept, rows, positions) -> torch.Tensor:
        return choice(kept[:, None], rows, self._noise.of(rows.seed, positions, kept.shape[-1]))[:, 0]

    def probabilities(self, kept, rows) -> torch.Tensor:
        return torch.softmax(kept, dim=-1)


class TritonOps:
    """The kernels: compiled on a CUDA GPU, or interpreted on the host under ``TRITON_INTERPRET=1``."""

    q_stays_in_slots = True

    def __init__(self):
        from idlm_kernels import rows, step

        self._rows, self._step = rows, step
        if interpreted():
            logger.warning("idlm: IDLM_STEP_OPS=%s under TRITON_INTERPRET=1: kernels are interpreted on the host, slowly, for tests", TRITON)

    def step(self, logits, carried, limits, seq_lens, rows, forks, salvage, state, slots) -> StepOutcome:
        index, positions = self._rows.step_rows(carried.counts, seq_lens, carried.drafts.shape[1], forks)
        read = self._rows.Rows(logits, index, positions)
        out, _ = self._step.isd_step(read, rows, carried.drafts, carried.counts, carried.log_q, limits, state.q, slots, forks, salvage)
        proposal = Proposal(out.drafts, out.counts, out.log_q, None, out.clean)
        return StepOutcome(out.tokens, out.accept_lens, out.last, proposal, out.introspection, out.deciding)

    def first(self, logits, limits, seq_lens, rows, state, slots) -> Proposal:
        draws = self._step.first_drafts(self._plain(logits, seq_lens), rows, state.q, slots)
        counts = limits.to(torch.int64).clamp(max=logits.shape[1])
        return Proposal(draws.tokens, counts, draws.log_p, None, counts)

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
