"""The ``idlm:*`` Prometheus series, counted on the host from results that have arrived there anyway.

Counting happens where the scheduler has decided what a step really committed: behind stops, limits and aborts. Rows of
requests that had already ended (the overlap schedule runs one step too many) are left out. One TP rank counts.
"""

import logging
from dataclasses import dataclass, field

from idlm_sglang.engine.spec_io import IsdResult

logger = logging.getLogger(__name__)

VERIFY, COLD, SINGLE = "verify", "cold", "single"

# Proposals after which a model that accepts next to nothing is reported, and how little that is.
_WARN_AFTER = 512
_WARN_BELOW = 0.02


@dataclass
class Totals:
    """Plain counts since start."""

    tokens: int = 0
    forwards: int = 0
    rounds: dict[str, int] = field(default_factory=lambda: {VERIFY: 0, COLD: 0, SINGLE: 0})
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    introspection: float = 0.0
    tried: int = 0

    def as_dict(self) -> dict:
        rounds = sum(self.rounds.values())
        return {
            "tokens_committed": self.tokens,
            "forwards": self.forwards,
            "rounds": dict(self.rounds),
            "drafts_proposed": list(self.proposed),
            "drafts_accepted": list(self.accepted),
            "introspective_acceptance": self.introspection / self.tried if self.tried else None,
            "tokens_per_forward": self.tokens / rounds if rounds else None,
        }


class IsdMetrics:
    """Counts decode steps; publishes them when ``labels`` is given.

    Args:
        max_drafts: K at the largest stride.
        labels: Prometheus labels (``model_name``, ``dp_rank``), or None to count without publishing.
    """

    def __init__(self, max_drafts: int, labels: dict[str, str] | None):
        self.totals = Totals(proposed=[0] * max_drafts, accepted=[0] * max_drafts)
        self._warned = False
        self._series = _series(labels, max_drafts) if labels is not None else None

    def request(self, mode: str, reason: str) -> None:
        """A request was admitted or refused."""
        if self._series:
            self._series["requests"](mode=mode, reason=reason).inc()

    def before(self, batch) -> list[int | None]:
        """Output lengths before a step's tokens are appended; None for rows that no longer count."""
        return [None if req.finished() or req.is_retracted else len(req.output_ids) for req in batch.reqs]

    def after(self, batch, result: IsdResult, lengths: list[int | None]) -> None:
        """Count a step once its tokens have been appended and trimmed."""
        stats = result.round_stats.tolist() if result.round_stats is not None else None
        tokens, rounds = 0, {VERIFY: 0, COLD: 0, SINGLE: 0}
        k = len(self.totals.proposed)
        proposed, accepted = [0] * k, [0] * k
        introspection, tried = 0.0, 0
        for i, (req, length) in enumerate(zip(batch.reqs, lengths)):
            if length is None:
                continue
            end = len(req.output_ids) if req.finished_len is None else min(req.finished_len, len(req.output_ids))
            tokens += max(end - length, 0)
            if stats is None or result.limits[i] == 0:
                rounds[SINGLE] += 1
                continue
            count, run = int(stats[i][0]), int(stats[i][1])
            rounds[VERIFY if count else COLD] += 1
            for position in range(count):
                proposed[position] += 1
                accepted[position] += position < run
            introspection += stats[i][2]
            tried += min(run + 1, count)
        self._add(tokens, rounds, proposed, accepted, introspection, tried)

    def _add(self, tokens, rounds, proposed, accepted, introspection, tried) -> None:
        totals, series = self.totals, self._series
        totals.tokens += tokens
        totals.forwards += 1
        totals.introspection += introspection
        totals.tried += tried
        for kind, n in rounds.items():
            totals.rounds[kind] += n
        for i, (p, a) in enumerate(zip(proposed, accepted)):
            totals.proposed[i] += p
            totals.accepted[i] += a
        if series:
            series["tokens"].inc(tokens)
            series["forwards"].inc()
            series["introspection_sum"].inc(introspection)
            series["introspection_count"].inc(tried)
            for kind, n in rounds.items():
                series["rounds"][kind].inc(n)
            for i, (p, a) in enumerate(zip(proposed, accepted)):
                series["proposed"][i].inc(p)
                series["accepted"][i].inc(a)
        self._warn_when_nothing_is_accepted()

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

    tokens = counter("tokens_committed", "Tokens committed by decode forwards, after stops and limits.")
    forwards = counter("forwards", "Decode forwards of the engine, one for a whole batch.")
    rounds = counter("rounds", "Per-request decode rounds: verify (had drafts), cold (had none), single (one token per step).", ("kind",))
    proposed = counter("drafts_proposed", "Drafts verified, by position behind the pending token.", ("position",))
    accepted = counter("drafts_accepted", "Drafts accepted, by position behind the pending token.", ("position",))
    introspection_sum = counter("introspective_acceptance_sum", "Sum of min(1, p/q) over tried drafts.")
    introspection_count = counter("introspective_acceptance_count", "Drafts tried: accepted ones and the first rejected one.")
    requests = counter("requests", "Requests by decode mode and reason.", ("mode", "reason"))
    return {
        "tokens": tokens.labels(**labels),
        "forwards": forwards.labels(**labels),
        "rounds": {kind: rounds.labels(**labels, kind=kind) for kind in (VERIFY, COLD, SINGLE)},
        "proposed": [proposed.labels(**labels, position=str(i + 1)) for i in range(max_drafts)],
        "accepted": [accepted.labels(**labels, position=str(i + 1)) for i in range(max_drafts)],
        "introspection_sum": introspection_sum.labels(**labels),
        "introspection_count": introspection_count.labels(**labels),
        "requests": lambda **extra: requests.labels(**labels, **extra),
    }
