"""What one request asked of ISD, and a batch of such requests as device tensors."""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch

from idlm_sglang.config import MAX_STRIDE, Settings
from idlm_sglang.engine.penalties import penalised_rows
from idlm_sglang.engine.transfer import on_device
from idlm_sglang.isd.target import SamplingRows, host_flags
from idlm_sglang.isd.trim import Record

STRIDE_PARAM = "idlm_stride"
# Marks a repetition by the self-check: it is no service to a client.
SELFCHECK_PARAM = "idlm_selfcheck"
SELFCHECK = "selfcheck"
_INT64 = 1 << 64

STRIDED, SINGLE, REFUSED = "strided", "single", "refused"

_numbers = itertools.count(1)


@dataclass(frozen=True)
class RequestPlan:
    """Decided once per request, at admission.

    Attributes:
        number: unique in this process and equal on every TP rank (requests arrive in the same order); stamps drafts.
        mode: ``strided``, ``single`` (one token per step) or ``refused``.
        reason: why, one word for a metric label.
        stride: the stride asked for by ``custom_params``, or None for the server's.
        seed: 64-bit key of the request's noise; drawn by the server where the client gave none.
        coupled: the coupled rule decides, so that the seed alone fixes a sampled answer.
        message: for a refused request, what to tell the client.
        trace: the answer says how each of its tokens came (``engine.trace``).
    """

    number: int
    mode: str
    reason: str
    stride: int | None
    seed: int
    coupled: bool
    message: str = ""
    trace: bool = False


def derived_seed(server_seed: int, number: int) -> int:
    """The noise key of a request without a seed, 0 to 2^53 - 1: a SplitMix64 step over (server seed, request number).

    Answers report it: 53 bits pass through JSON readers that hold numbers as doubles.
    """
    x = (server_seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) % _INT64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % _INT64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % _INT64
    return (x ^ (x >> 31)) >> 11


def next_number() -> int:
    """Counts requests in the order the scheduler sees them."""
    return next(_numbers)


def server_seed() -> int:
    """A seed that the TP ranks of one replica share and that differs between data-parallel replicas.

    SGLang broadcasts its ``random_seed`` over the TP ranks and seeds torch with it; replicas have the same one.
    """
    from sglang.srt.runtime_context import get_parallel

    return derived_seed(torch.initial_seed(), get_parallel().dp_rank or 0)


def stride_limit(plan: RequestPlan, settings: Settings, server_stride: int, most: int = MAX_STRIDE) -> int:
    """Most drafts the request may carry: its stride minus one, ``most`` being the largest stride there is room for."""
    if plan.mode != STRIDED:
        return 0
    return min(plan.stride or server_stride, settings.max_stride, most) - 1


def stop_tokens(req) -> frozenset[int]:
    """The tokens that end the answer of an admitted request, as SGLang looks for them."""
    found = getattr(req, "idlm_stops", None)
    if found is None:
        params, tokenizer = req.sampling_params, req.tokenizer
        ids = set(params.stop_token_ids or ()) | set(req.eos_token_ids or ())
        if tokenizer is not None:
            ids |= {tokenizer.eos_token_id} | set(tokenizer.additional_stop_token_ids or ())
        found = req.idlm_stops = frozenset() if params.ignore_eos else frozenset(ids - {None})
    return found


def record_of(req) -> Record:
    """How the drafts of a request stood; it outlives a retraction."""
    found = getattr(req, "idlm_record", None)
    if found is None:
        found = req.idlm_record = Record()
    return found


def last_column(req) -> int:
    """Columns of an admitted request when its answer is as long as it may be."""
    return len(req.origin_input_ids) + req.sampling_params.max_new_tokens


class BatchRows:
    """Per-request constants of one decode batch, built on the host and copied to the device once.

    Attributes:
        numbers: ``(B,)`` int64 request numbers; limits: ``(B,)`` int64 draft limits; seeds: ``(B,)`` int64;
        coupled: ``(B,)`` bool; ones: ``(B,)`` int32, as many tokens as a step of stride 1 commits. All on the device.
        limits_host: the limits as a list; drafts: K of this step, the largest of them.
        grammars: host list of the rows whose grammar is walked over the drafts.
        single_grammar: some grammar cannot be walked; its row decodes one token per step.
        follows: some row has the server's stride, and no own.
        penalised: the penalised rows, or None.
        any_sampled, any_rejection: as in :class:`SamplingRows`; flags: its others; keyed: some sampled request's seed alone fixes its answer.
    """

    def __init__(self, reqs, plans: list[RequestPlan], settings: Settings, server_stride: int, vocab: int, device, most: int = MAX_STRIDE):
        limits = [stride_limit(plan, settings, server_stride, most) for plan in plans]
        # Walking a grammar looks at drafts, which only the coupled rule permits.
        coupled = [plan.coupled or req.grammar is not None for req, plan in zip(reqs, plans)]
        host = torch.tensor(
            [[p.number for p in plans], limits, [p.seed for p in plans], [int(c) for c in coupled]], dtype=torch.int64
        )
        packed = on_device(host, device)
        self.numbers, self.limits, self.seeds = packed[0], packed[1], packed[2]
        self.coupled = packed[3].bool()
        self.ones = torch.ones(len(plans), dtype=torch.int32, device=device)
        self.limits_host = limits
        self.drafts = max(limits)
        self.follows = any(plan.mode == STRIDED and plan.stride is None for plan in plans)
        self.grammars = [i for i, req in enumerate(reqs) if req.grammar is not None and settings.strided_grammars]
        self.single_grammar = not settings.strided_grammars and any(req.grammar is not None for req in reqs)
        self.penalised = penalised_rows(reqs, vocab, device)
        self._coupled = list(zip(reqs, coupled))
        self.any_sampled = any(r.sampling_params.top_k > 1 for r in reqs)
        self.flags = host_flags((r.sampling_params.top_k, r.sampling_params.top_p, r.sampling_params.min_p) for r in reqs)
        self.keyed = any(p.coupled and r.sampling_params.top_k > 1 for p, r in zip(plans, reqs))
        self.any_rejection = any(not c and r.sampling_params.top_k > 1 for c, r in zip(coupled, reqs))

    @cached_property
    def stops(self) -> list[frozenset[int]]:
        """Tokens behind which a request's drafts are not worth a row. None for the rejection rule, which may not look at drafts, and for grammars, which may
        forbid the end."""
        looks = [req.grammar is None and (coupled or req.sampling_params.top_k <= 1) for req, coupled in self._coupled]
        return [stop_tokens(req) if look else frozenset() for (req, _), look in zip(self._coupled, looks)]

    @cached_property
    def records(self) -> list[Record]:
        """How each request's drafts stood, kept up to date (``IsdMetrics.end``)."""
        return [record_of(req) for req, _ in self._coupled]

    @cached_property
    def ends(self) -> list[int]:
        """:func:`last_column` of each request."""
        return [last_column(req) for req, _ in self._coupled]

    def give_seeds(self, info) -> None:
        """``engine.sampler.give_seeds`` for a batch of these requests."""
        info.idlm_seeds, info.idlm_flags = (self.seeds if self.keyed else None), self.flags

    def sampling(self, info) -> SamplingRows:
        """With SGLang's ``SamplingBatchInfo`` of the same batch."""
        return SamplingRows(
            temperature=info.temperatures.view(-1),
            top_k=info.top_ks,
            top_p=info.top_ps,
            min_p=info.min_ps,
            seed=self.seeds,
            coupled=self.coupled,
            any_sampled=self.any_sampled,
            any_rejection=self.any_rejection,
            **self.flags,
        )
