"""What the engine did during one point, from the counters at its ``/metrics`` before and behind it."""

from collections import Counter
from dataclasses import asdict, dataclass

from prometheus_client.parser import text_string_to_metric_families

_IDLM = "idlm:"
_VERIFIES = "sglang:spec_verify_calls_total"
_GENERATED = "sglang:generation_tokens_total"
_RETRACTED = "sglang:num_retracted_requests_total"
RETRACTED = (_RETRACTED, "")


@dataclass(frozen=True)
class Decoding:
    """How requests were decoded during one point.

    Attributes:
        tokens_per_forward: tokens committed per request and decode forward (TPF).
        queries: rows of one request in one forward, the mean: 2N - 1 at stride N where none is left out, 1 in AR.
        efficiency: TPF^2 / queries.
        introspective_acceptance: mean of min(1, p/q) over tried drafts, None without drafts.
        accepted, proposed: drafts by position behind the pending token.
        cold: share of the rounds that had no drafts to verify.
    """

    tokens_per_forward: float
    queries: float
    efficiency: float
    introspective_acceptance: float | None = None
    accepted: tuple[int, ...] = ()
    proposed: tuple[int, ...] = ()
    cold: float = 0.0

    def as_dict(self) -> dict:
        return asdict(self)


class Counts(Counter):
    """Counters of one scrape, keyed by name and the labels that matter here, summed over the others."""

    def __init__(self, text: str = ""):
        super().__init__()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                # Gauges are no counts: they go down.
                own = sample.name.startswith(_IDLM) and sample.name.endswith("_total")
                if own or sample.name in (_VERIFIES, _GENERATED, _RETRACTED):
                    self[sample.name, sample.labels.get("position") or sample.labels.get("kind") or sample.labels.get("stride") or ""] += sample.value

    def since(self, before: "Counts") -> "Counts":
        found = Counts()
        found.update({key: value - before[key] for key, value in self.items()})
        return found


def decoding(counts: Counts, answers: int, stride: int | None, algorithm: str | None, draft_tokens: int | None) -> Decoding | None:
    """Figures of the counts of one point; None where the server has no counters for its algorithm.

    ``answers``: finished in this point. ``stride``: N of an ISD server, the last one where it changed. ``algorithm``: what else decodes several tokens at a time there, None for
    AR. ``draft_tokens``: rows it verifies per request.
    """
    if any(value < 0 for value in counts.values()):
        return None  # a server that was restarted, or another one behind the same address
    if stride is not None:
        rounds = {kind: counts["idlm:rounds_total", kind] for kind in ("verify", "salvage", "cold", "single")}
        total = sum(rounds.values())
        if not total:
            return None
        steps = {int(label): count for (name, label), count in counts.items() if name == "idlm:steps_total" and count}
        if ("idlm:rows_total", "") in counts:
            queries = counts["idlm:rows_total", ""] / total
        else:  # a server that does not count them
            queries = sum((2 * n - 1) * count for n, count in steps.items()) / sum(steps.values()) if steps else 2 * stride - 1
        tpf = counts["idlm:tokens_committed_total", ""] / total
        tried = counts["idlm:introspective_acceptance_count_total", ""]
        positions = [str(i) for i in range(1, max(steps, default=stride))]
        return Decoding(
            tpf,
            queries,
            tpf**2 / queries,
            counts["idlm:introspective_acceptance_sum_total", ""] / tried if tried else None,
            tuple(int(counts["idlm:drafts_accepted_total", p]) for p in positions),
            tuple(int(counts["idlm:drafts_proposed_total", p]) for p in positions),
            rounds["cold"] / total,
        )
    if algorithm is None:
        return Decoding(1.0, 1, 1.0)
    verifies = counts[_VERIFIES, ""]
    if not verifies or not draft_tokens:
        return None
    # An answer's first token comes from its prefill.
    tpf = (counts[_GENERATED, ""] - answers) / verifies
    return Decoding(tpf, draft_tokens, tpf**2 / draft_tokens)
