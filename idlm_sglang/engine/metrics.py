"""The ``idlm:*`` Prometheus series, counted on the host from results that have arrived there anyway.

Counting happens where the scheduler has decided what a step really committed: behind stops, limits and aborts. Rows of
requests that had already ended (the overlap schedule runs one step too many) and of the self-check are left out. One
TP rank counts.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from idlm_sglang.engine.phases import PHASES
from idlm_sglang.engine.requests import SELFCHECK, STRIDED, record_of
from idlm_sglang.engine.spec_io import IsdResult
from idlm_sglang.engine.stride_series import StrideSeries
from idlm_sglang.engine.trace import trace_of

logger = logging.getLogger(__name__)

VERIFY, SALVAGE, COLD, SINGLE = KINDS = ("verify", "salvage", "cold", "single")

# Sums by position behind the pending token; survivors of rejections apart from drafts of the paper's rounds.
_BY_POSITION = ("proposed", "accepted", "salvage_proposed", "salvage_accepted")

# Prometheus counters live in a shared file, and an increment takes longer than the counting: they follow the plain counts
# with the step that ends a request, and at least this often (in steps).
_PUBLISH_EVERY = 16

# Proposals after which a model that accepts next to nothing is reported, and how little that is.
_WARN_AFTER = 512
_WARN_BELOW = 0.02


@dataclass
class Totals:
    """Plain counts since start."""

    tokens: int = 0
    forwards: int = 0
    rows: int = 0
    rounds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    salvage_proposed: list[int] = field(default_factory=list)
    salvage_accepted: list[int] = field(default_factory=list)
    introspection: float = 0.0
    tried: int = 0
    answers: int = 0

    @classmethod
    def none(cls, max_drafts: int) -> "Totals":
        """Nothing counted, K = ``max_drafts`` positions."""
        return cls(**{name: [0] * max_drafts for name in _BY_POSITION})

    def round(self, kind: str, tokens: int, count: int, run: int, introspection: float, rows: int) -> None:
        """One request in one forward of ``rows`` rows for it: ``count`` drafts verified, ``run`` of them accepted, ``tokens`` tokens committed."""
        self.tokens += tokens
        self.rows += rows
        self.rounds[kind] += 1
        survivors = kind == SALVAGE
        proposed, accepted = (self.salvage_proposed, self.salvage_accepted) if survivors else (self.proposed, self.accepted)
        for position in range(count):
            proposed[position] += 1
            accepted[position] += position < run
        if not survivors:
            self.introspection += introspection
            self.tried += min(run + 1, count)

    def as_dict(self) -> dict:
        rounds = sum(self.rounds.values())
        return {
            "tokens_committed": self.tokens,
            "forwards": self.forwards,
            "rounds": dict(self.rounds),
            "rows": self.rows,
            "drafts_proposed": list(self.proposed),
            "drafts_accepted": list(self.accepted),
            "salvage_proposed": list(self.salvage_proposed),
            "salvage_accepted": list(self.salvage_accepted),
            "introspective_acceptance": self.introspection / self.tried if self.tried else None,
            "tokens_per_forward": self.tokens / rounds if rounds else None,
        }


@dataclass
class Figures:
    """What decode forwards did for one request.

    Attributes:
        forwards: decode forwards it took part in.
        tokens: tokens they committed, behind stops and limits.
        proposed: drafts verified; accepted: those of them that were accepted and committed.
        histogram: forwards by the number of accepted drafts they committed.
    """

    forwards: int = 0
    tokens: int = 0
    proposed: int = 0
    accepted: int = 0
    histogram: list[int] = field(default_factory=list)

    def add(self, tokens: int, proposed: int, run: int) -> None:
        """One forward that verified ``proposed`` drafts, accepted ``run`` of them and committed ``tokens`` tokens."""
        kept = min(run, tokens)
        self.forwards += 1
        self.tokens += tokens
        self.proposed += proposed
        self.accepted += kept
        self.histogram.extend([0] * (kept + 1 - len(self.histogram)))
        self.histogram[kept] += 1

    def as_meta_info(self) -> dict:
        """Under the names that SGLang's own figures have; nothing for an answer that came from its prefill alone."""
        if self.forwards == 0:
            return {}
        return {
            "spec_accept_rate": self.accepted / self.proposed if self.proposed else 0.0,
            "spec_accept_length": self.tokens / self.forwards,
            "spec_num_correct_drafts": self.accepted,
            "spec_num_proposed_drafts": self.proposed,
            "spec_verify_ct": self.forwards,
            "spec_correct_drafts_histogram": list(self.histogram),
        }


def figures_of(req) -> Figures:
    """The figures of a request so far; they outlive a retraction."""
    found = getattr(req, "idlm_figures", None)
    if found is None:
        found = req.idlm_figures = Figures()
    return found


class IsdMetrics:
    """Counts decode steps; publishes them when ``labels`` is given.

    SGLang appends and trims a step's tokens, and then sends what is finished: :meth:`begin` comes before, :meth:`end` between the two.

    Args:
        max_drafts: K at the largest stride.
        labels: Prometheus labels (``model_name``, ``dp_rank``), or None to count without publishing.
        seconds: host seconds by phase since start, kept up to date by their owner (``engine.phases``).
        strides: publishes with these.
    """

    def __init__(self, max_drafts: int, labels: dict[str, str] | None, seconds: dict[str, float], strides: StrideSeries):
        self.seconds, self._strides = seconds, strides
        self.totals = Totals.none(max_drafts)
        # Told of each step (`engine.controller.StrideControl.rounds`).
        self.on_step: Callable[[list[tuple[int, int, bool]], tuple[int, int, int] | None], None] | None = None
        # Rounds whose first draft was tried, or left out in doubt, and of how many it stood; survivors apart.
        self._first = [0, 0]
        self._warned = False
        self._step: tuple[list[tuple], IsdResult] | None = None
        self._told = (0, 0, 0, 0)
        self._requests = requests_counter(labels) if labels is not None else None
        self._series = _series(labels, max_drafts) if labels is not None else None
        self._published = self._values()

    def request(self, mode: str, reason: str) -> None:
        """A request was admitted or refused."""
        if self._requests is not None:
            self._requests(mode=mode, reason=reason).inc()

    def begin(self, batch, result: IsdResult) -> None:
        """A step's result has arrived; none of its tokens is appended yet. Rows that had ended before are left out."""
        rows = [(i, req, len(req.output_ids)) for i, req in enumerate(batch.reqs) if not (req.finished() or req.is_retracted)]
        self._step = rows, result

    def end(self) -> None:
        """The step's tokens are appended and trimmed: count it. A second call does nothing."""
        if self._step is None:
            return
        (rows, result), self._step = self._step, None
        totals, stats, limits = self.totals, None if result.round_stats is None else result.round_stats.tolist(), result.limits
        width, seen, ends, committed = result.speculative_num_draft_tokens, [], False, None
        for i, req, start in rows:
            length, finished, plan = len(req.output_ids), req.finished(), req.idlm_plan
            tokens = max((length if req.finished_len is None else min(req.finished_len, length)) - start, 0)
            if stats is None or limits[i] == 0:
                count, run, introspection, kind = 0, 0, 0.0, SINGLE
            else:
                count, run, introspection, clean = stats[i]
                count, run = int(count), int(run)
                kind = SALVAGE if count > clean else VERIFY if count else COLD
            figures_of(req).add(tokens, count, run)
            # A draft that was doubted counts as one that fell: tokens per round are expected of drafts as they were drawn.
            doubted = result.doubted is not None and result.doubted[i]
            seen.append((count + doubted, run, kind == SALVAGE))
            # What a grammar forces stands, and says nothing of MASK rows.
            if result.doubted is not None and kind != SALVAGE and req.grammar is None:
                record_of(req).add(count + doubted, run)
            if plan.mode == STRIDED and plan.stride is None:
                before = (0, 0) if committed is None else committed[1:]
                committed = 1 if stats is None else limits[i] + 1, before[0] + tokens, before[1] + 1
            if plan.trace:
                trace_of(req).add(start, tokens, kind, count, run)
            if plan.reason != SELFCHECK:
                totals.round(kind, tokens, count, run, introspection, width if result.lens is None else result.lens[i])
                totals.answers += finished
            ends |= finished
        totals.forwards += 1
        if self._series is not None and (ends or totals.forwards % _PUBLISH_EVERY == 0):
            self._publish()
        if self.on_step is not None:
            self.on_step(seen, committed)
        if stats is not None and not self._warned:
            self._warn_when_nothing_is_accepted(seen)

    def _values(self) -> list[float]:
        """What is published, in the order of ``_series``."""
        t = self.totals
        by_position = (n for name in _BY_POSITION for n in getattr(t, name))
        return [t.tokens, t.forwards, t.rows, t.introspection, t.tried, *t.rounds.values(), *self.seconds.values(), *by_position]

    def _publish(self) -> None:
        before, self._published = self._published, self._values()
        for counter, now, then in zip(self._series, self._published, before, strict=True):
            if now != then:
                counter.inc(now - then)
        self._strides.publish()

    def interval(self) -> tuple[int, int, int, int]:
        """Tokens, rounds, drafts proposed and drafts accepted since the last call."""
        t = self.totals
        proposed, accepted = t.proposed + t.salvage_proposed, t.accepted + t.salvage_accepted
        now = (t.tokens, sum(t.rounds.values()), sum(proposed), sum(accepted))
        since, self._told = tuple(a - b for a, b in zip(now, self._told)), now
        return since

    def _warn_when_nothing_is_accepted(self, seen: list[tuple[int, int, bool]]) -> None:
        linear = [run for count, run, survivors in seen if count and not survivors]
        self._first[0] += len(linear)
        self._first[1] += sum(run > 0 for run in linear)
        tried, stood = self._first
        if tried < _WARN_AFTER:
            return
        self._warned = True
        if stood < _WARN_BELOW * tried:
            logger.warning(
                "idlm: the model accepts almost none of its own drafts (%d of the first %d at position 1): output stays exact, "
                "but there is no speed-up. Was this checkpoint trained with MASK tokens?",
                stood,
                tried,
            )


def _series(labels: dict[str, str], max_drafts: int) -> list:
    """The counters, in the order of ``IsdMetrics._values``."""
    # Imported here: prometheus_client settles on its multiprocess directory at import, and SGLang sets it late.
    from prometheus_client import Counter

    names = list(labels)

    def counter(name: str, text: str, extra: tuple[str, ...] = ()) -> Counter:
        return Counter(f"idlm:{name}", text, labelnames=[*names, *extra])

    def by_position(series: Counter) -> list:
        return [series.labels(**labels, position=str(i + 1)) for i in range(max_drafts)]

    tokens = counter("tokens_committed", "Tokens committed by decode forwards, after stops and limits.")
    forwards = counter("forwards", "Decode steps of the engine, one for a whole batch.")
    rows = counter("rows", "Rows of requests in decode forwards: 2N - 1 each, less those that were left out (ragged verify).")
    rounds = counter("rounds", "Per-request decode rounds: verify (had drafts), salvage (had survivors), cold (had none), single (one token per step).", ("kind",))
    proposed = counter("drafts_proposed", "Drafts verified, by position behind the pending token.", ("position",))
    accepted = counter("drafts_accepted", "Drafts accepted, by position behind the pending token.", ("position",))
    salvage_proposed = counter("salvage_proposed", "Survivors of rejections verified, by position behind the pending token.", ("position",))
    salvage_accepted = counter("salvage_accepted", "Survivors of rejections accepted, by position behind the pending token.", ("position",))
    introspection_sum = counter("introspective_acceptance_sum", "Sum of min(1, p/q) over tried drafts, survivors left out.")
    introspection_count = counter("introspective_acceptance_count", "Drafts tried: accepted ones and the first rejected one.")
    seconds = counter("step_seconds", "Seconds of the scheduler's thread by phase of a step: prepare, forward, choose, process, prefill.", ("phase",))
    return [
        *(series.labels(**labels) for series in (tokens, forwards, rows, introspection_sum, introspection_count)),
        *(rounds.labels(**labels, kind=kind) for kind in KINDS),
        *(seconds.labels(**labels, phase=phase) for phase in PHASES),
        *(child for series in (proposed, accepted, salvage_proposed, salvage_accepted) for child in by_position(series)),
    ]


def requests_counter(labels: dict[str, str]):
    """``idlm:requests_total`` as a function of mode and reason that gives the counter to increment. The scheduler counts
    what it admits, the process that answers HTTP what it refuses, with an empty ``dp_rank``."""
    from prometheus_client import Counter

    requests = Counter("idlm:requests", "Requests by decode mode and reason.", labelnames=[*labels, "mode", "reason"])
    return lambda **extra: requests.labels(**labels, **extra)
