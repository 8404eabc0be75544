"""The ``idlm:*`` Prometheus series, counted on the host from results that have arrived there anyway.

Counting happens where the scheduler has decided what a step really committed: behind stops, limits and aborts. Rows of
requests that had already ended (the overlap schedule runs one step too many) and of the self-check are left out. One
TP rank counts.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from idlm_sglang.engine.phases import PHASES
from idlm_sglang.engine.requests import SELFCHECK
from idlm_sglang.engine.spec_io import IsdResult
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

    def add(self, other: "Totals") -> None:
        """Count what ``other`` counted."""
        self.tokens += other.tokens
        self.forwards += other.forwards
        self.introspection += other.introspection
        self.tried += other.tried
        self.answers += other.answers
        for kind, n in other.rounds.items():
            self.rounds[kind] += n
        for name in _BY_POSITION:
            mine = getattr(self, name)
            for i, n in enumerate(getattr(other, name)):
                mine[i] += n

    def as_dict(self) -> dict:
        rounds = sum(self.rounds.values())
        return {
            "tokens_committed": self.tokens,
            "forwards": self.forwards,
            "rounds": dict(self.rounds),
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


@dataclass
class _Step:
    """One decode step while SGLang works through its rows, ``left`` of which are still to come."""

    lengths: list[int]
    left: int
    counts: Totals
    stats: list[list[float]] | None = None
    seen: list[tuple[int, int, bool]] = field(default_factory=list)
    ends: bool = False


class IsdMetrics:
    """Counts decode steps; publishes them when ``labels`` is given.

    SGLang sends a finished answer while it still works on the step that finished it. So a step is counted row by row:
    :meth:`begin`, :meth:`row` for each request once its tokens are appended and trimmed, :meth:`end` with the last of them.

    Args:
        max_drafts: K at the largest stride.
        labels: Prometheus labels (``model_name``, ``dp_rank``), or None to count without publishing.
        seconds: host seconds by phase since start, kept up to date by their owner (``engine.phases``).
    """

    def __init__(self, max_drafts: int, labels: dict[str, str] | None, seconds: dict[str, float]):
        self.seconds = seconds
        self._published_seconds = dict(seconds)
        self.totals = Totals.none(max_drafts)
        self._unpublished = Totals.none(max_drafts)
        # Told of each step's rounds, as (drafts verified, accepted, whether they were survivors) per request.
        self.on_step: Callable[[list[tuple[int, int, bool]]], None] | None = None
        self._warned = False
        self._step: _Step | None = None
        self._told = (0, 0, 0, 0)
        self._series = _series(labels, max_drafts) if labels is not None else None

    def request(self, mode: str, reason: str) -> None:
        """A request was admitted or refused."""
        if self._series:
            self._series["requests"](mode=mode, reason=reason).inc()

    def begin(self, batch) -> None:
        """A step's result has arrived; none of its tokens is appended yet."""
        left = sum(not (req.finished() or req.is_retracted) for req in batch.reqs)
        self._step = _Step([len(req.output_ids) for req in batch.reqs], left, Totals.none(len(self.totals.proposed)))

    def row(self, req, result: IsdResult, i: int) -> None:
        """Row ``i`` of the step, its tokens appended and trimmed. SGLang leaves rows out that had already ended."""
        step = self._step
        if step is None:
            return
        if step.stats is None and result.round_stats is not None:
            step.stats = result.round_stats.tolist()
        end = len(req.output_ids) if req.finished_len is None else min(req.finished_len, len(req.output_ids))
        tokens = max(end - step.lengths[i], 0)
        single = step.stats is None or result.limits[i] == 0
        count, run = (0, 0) if single else map(int, step.stats[i][:2])
        figures_of(req).add(tokens, count, run)
        salvage = not single and step.stats[i][3] > 0
        step.seen.append((count, run, salvage))
        kind = SINGLE if single else SALVAGE if salvage else VERIFY if count else COLD
        if req.idlm_plan.trace:
            trace_of(req).add(step.lengths[i], tokens, kind, count, run)
        if req.idlm_plan.reason != SELFCHECK:
            self._count(step.counts, kind, tokens, count, run, step.stats[i][2] if count else 0.0)
            step.counts.answers += req.finished()
        step.ends |= req.finished()
        step.left -= 1
        if step.left == 0:
            # Before the answers leave: who has one finds it counted.
            self.end()

    @staticmethod
    def _count(counts: Totals, kind: str, tokens: int, count: int, run: int, introspection: float) -> None:
        counts.tokens += tokens
        counts.rounds[kind] += 1
        survivors = kind == SALVAGE
        proposed = counts.salvage_proposed if survivors else counts.proposed
        accepted = counts.salvage_accepted if survivors else counts.accepted
        for position in range(count):
            proposed[position] += 1
            accepted[position] += position < run
        if not survivors:
            counts.introspection += introspection
            counts.tried += min(run + 1, count)

    def end(self) -> None:
        """All rows of the step are counted. A second call does nothing."""
        step = self._step
        if step is None:
            return
        self._step = None
        step.counts.forwards = 1
        self.totals.add(step.counts)
        if self._series:
            self._unpublished.add(step.counts)
            if step.ends or self._unpublished.forwards >= _PUBLISH_EVERY:
                self._publish()
        if self.on_step is not None:
            self.on_step(step.seen)
        self._warn_when_nothing_is_accepted()

    def _publish(self) -> None:
        counts, series = self._unpublished, self._series
        self._unpublished = Totals.none(len(counts.proposed))
        amounts = [(series["tokens"], counts.tokens), (series["forwards"], counts.forwards)]
        amounts += [(series["introspection_sum"], counts.introspection), (series["introspection_count"], counts.tried)]
        amounts += [(series["rounds"][kind], n) for kind, n in counts.rounds.items()]
        for name in _BY_POSITION:
            amounts += zip(series[name], getattr(counts, name))
        amounts += [(series["seconds"][phase], self.seconds[phase] - self._published_seconds[phase]) for phase in PHASES]
        self._published_seconds = dict(self.seconds)
        for counter, n in amounts:
            if n:
                counter.inc(n)

    def interval(self) -> tuple[int, int, int, int]:
        """Tokens, rounds, drafts proposed and drafts accepted since the last call."""
        t = self.totals
        proposed, accepted = t.proposed + t.salvage_proposed, t.accepted + t.salvage_accepted
        now = (t.tokens, sum(t.rounds.values()), sum(proposed), sum(accepted))
        since, self._told = tuple(a - b for a, b in zip(now, self._told)), now
        return since

    def _warn_when_nothing_is_accepted(self) -> None:
        t = self.totals
        if self._warned or not t.proposed or t.proposed[0] < _WARN_AFTER:
            return
        self._warned = True
        if t.accepted[0] < _WARN_BELOW * t.proposed[0]:
            logger.warning(
                "idlm: the model accepts almost none of its own drafts (%d of the first %d at position 1): output stays exact, "
                "but there is no speed-up. Was this checkpoint trained with MASK tokens?",
                t.accepted[0],
                t.proposed[0],
            )


def _series(labels: dict[str, str], max_drafts: int) -> dict:
    # Imported here: prometheus_client settles on its multiprocess directory at import, and SGLang sets it late.
    from prometheus_client import Counter

    names = list(labels)

    def counter(name: str, text: str, extra: tuple[str, ...] = ()) -> Counter:
        return Counter(f"idlm:{name}", text, labelnames=[*names, *extra])

    def by_position(series: Counter) -> list:
        return [series.labels(**labels, position=str(i + 1)) for i in range(max_drafts)]

    tokens = counter("tokens_committed", "Tokens committed by decode forwards, after stops and limits.")
    forwards = counter("forwards", "Decode steps of the engine, one for a whole batch.")
    rounds = counter("rounds", "Per-request decode rounds: verify (had drafts), salvage (had survivors), cold (had none), single (one token per step).", ("kind",))
    proposed = counter("drafts_proposed", "Drafts verified, by position behind the pending token.", ("position",))
    accepted = counter("drafts_accepted", "Drafts accepted, by position behind the pending token.", ("position",))
    salvage_proposed = counter("salvage_proposed", "Survivors of rejections verified, by position behind the pending token.", ("position",))
    salvage_accepted = counter("salvage_accepted", "Survivors of rejections accepted, by position behind the pending token.", ("position",))
    introspection_sum = counter("introspective_acceptance_sum", "Sum of min(1, p/q) over tried drafts, survivors left out.")
    introspection_count = counter("introspective_acceptance_count", "Drafts tried: accepted ones and the first rejected one.")
    seconds = counter("step_seconds", "Seconds of the scheduler's thread by phase of a step: prepare, forward, choose, process, prefill.", ("phase",))
    requests = requests_counter(labels)
    return {
        "tokens": tokens.labels(**labels),
        "forwards": forwards.labels(**labels),
        "rounds": {kind: rounds.labels(**labels, kind=kind) for kind in KINDS},
        "proposed": by_position(proposed),
        "accepted": by_position(accepted),
        "salvage_proposed": by_position(salvage_proposed),
        "salvage_accepted": by_position(salvage_accepted),
        "introspection_sum": introspection_sum.labels(**labels),
        "introspection_count": introspection_count.labels(**labels),
        "seconds": {phase: seconds.labels(**labels, phase=phase) for phase in PHASES},
        "requests": requests,
    }


def requests_counter(labels: dict[str, str]):
    """``idlm:requests_total`` as a function of mode and reason that gives the counter to increment. The scheduler counts
    what it admits, the process that answers HTTP what it refuses, with an empty ``dp_rank``."""
    from prometheus_client import Counter

    requests = Counter("idlm:requests", "Requests by decode mode and reason.", labelnames=[*labels, "mode", "reason"])
    return lambda **extra: requests.labels(**labels, **extra)
