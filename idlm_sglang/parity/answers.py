"""The requests as written, to both servers: determined answers token by token, fields of all, scores where right is known."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from idlm_sglang.parity.compare import TOLERANCE, differences
from idlm_sglang.parity.endpoint import Reply, Side, chosen, failed, texts
from idlm_sglang.parity.findings import Finding, Table
from idlm_sglang.parity.options import Plan
from idlm_sglang.parity.prompts import GREEDY, SAMPLED, SEEDED, Ask
from idlm_sglang.quality.statistics import difference, score
from idlm_sglang.serving.replay import CHAT, COMPLETIONS, GENERATE

EQUAL, TIE, DIFFERENT = "equal", "near-tie", "different"
_CANDIDATES = 5  # log-probabilities asked for at each token
_SHOWN = 40  # rows of a report's table


@dataclass
class Pair:
    """One request and its two answers."""

    ask: Ask
    left: Reply
    right: Reply

    @property
    def refused(self) -> bool:
        """One of them is no answer: an HTTP error, or one inside a stream behind HTTP 200."""
        return failed(self.ask.path, self.left.answer) or failed(self.ask.path, self.right.answer)

    def texts(self) -> tuple[list[str], list[str]]:
        return texts(self.ask.path, self.left.answer.tree), texts(self.ask.path, self.right.answer.tree)


@dataclass
class Parting:
    """Where two determined answers part.

    Attributes:
        position: tokens they share, or None where the tokens are not known.
        margin: nats between the two best tokens there, the larger of both servers' words; None where not known.
        repeated: the difference was there when both were asked again.
        ours, theirs: what follows, baseline's and candidate's.
    """

    position: int | None
    margin: float | None
    repeated: bool
    ours: str
    theirs: str


def ask_both(asks: Sequence[Ask], left: Side, right: Side, clients: int) -> list[Pair]:
    """Both answers to every request, each request at the same time on both sides."""
    with ThreadPoolExecutor(clients) as pairs, ThreadPoolExecutor(2 * clients) as each:

        def both(ask: Ask) -> Pair:
            one, other = each.submit(left.ask, ask), each.submit(right.ask, ask)
            return Pair(ask, one.result(), other.result())

        return list(pairs.map(both, asks))


def determined(name: str, pairs: Sequence[Pair], left: Side, right: Side, plan: Plan) -> Finding:
    """Greedy or seeded answers, whole: text, calls, how they ended and their length. A seeded difference has no margin."""
    rows: list[list[Any]] = []
    count = {EQUAL: 0, TIE: 0, DIFFERENT: 0}
    for pair in pairs:
        ours, theirs = pair.texts()
        if ours == theirs:
            count[EQUAL] += 1
            continue
        found = parting(pair.ask, ours, theirs, left, right)
        tie = name == GREEDY and found.margin is not None and found.margin <= plan.tie_margin
        count[TIE if tie else DIFFERENT] += 1
        margin = "not known" if found.margin is None or name != GREEDY else f"{found.margin:.4f}"
        position = "not known" if found.position is None else found.position
        rows.append([pair.ask.place, pair.ask.path, TIE if tie else DIFFERENT, position, margin, "yes" if found.repeated else "no", found.ours, found.theirs])
    line = f"{count[EQUAL]} of {len(pairs)} answers equal"
    if name == GREEDY:
        line += f", {count[TIE]} part at near-ties (margin up to {plan.tie_margin:g} nats)"
    line += f", {count[DIFFERENT]} different"
    worst = next((row for row in rows if row[2] == DIFFERENT), None)
    if worst:
        line += f"; first: {worst[0]}, token {worst[3]}, margin {worst[4]}"
    heads = ("request", "path", "verdict", "shared tokens", "margin, nats", "again when asked again", "baseline goes on", "candidate goes on")
    return Finding(name, count[DIFFERENT] == 0 if pairs else None, line, [Table("First differences", heads, rows[:_SHOWN])] if rows else [])


def parting(ask: Ask, ours: list[str], theirs: list[str], left: Side, right: Side) -> Parting:
    """Where the first differing choice parts, with the margin as log-probabilities give it: both are asked again with them."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), 0)
    a, b = (side[at] if at < len(side) else "" for side in (ours, theirs))
    shared = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    body = _with_logprobs(ask)
    replies = [side.ask(ask, body).answer.tree for side in (left, right)]
    again = [chosen(ask.path, tree) for tree in replies]
    tokens = [choices[at] if at < len(choices) else [] for choices in again]
    names = [[token for token, _ in side] for side in tokens]
    repeated = names[0] != names[1]
    # The candidates are those of the answers asked for again: they speak for the first ones only where they part at the same character.
    said = [(texts(ask.path, tree)[at:] or [""])[0] for tree in replies]
    same_place = not repeated or (said[0][: shared + 1], said[1][: shared + 1]) == (a[: shared + 1], b[: shared + 1])
    position = next((i for i, (x, y) in enumerate(zip(*names)) if x != y), min(map(len, names)) if repeated else None)
    if position is None and names[0] and ask.path != GENERATE:
        # Equal this time: the token that holds the first differing character.
        ends, length = [], 0
        for name in names[0]:
            length += len(name)
            ends.append(length)
        position = next((i for i, end in enumerate(ends) if end > shared), None)
    margins = []
    for mine, other in ((tokens[0], names[1]), (tokens[1], names[0])):
        if position is not None and position < len(mine):
            margins.append(_margin(mine[position][1], mine[position][0], other[position] if position < len(other) else None))
    margins = [m for m in margins if m is not None] if same_place else []
    return Parting(position, max(margins, default=None), repeated, _short(a[shared:]), _short(b[shared:]))


def _margin(candidates: dict[str, float], mine: str, other: str | None) -> float | None:
    """Between this token and the other side's, or the two best where it is the same; None where one is not among the candidates."""
    if mine in candidates and other in candidates and mine != other:
        return abs(candidates[mine] - candidates[other])
    best = sorted(candidates.values(), reverse=True)
    return best[0] - best[1] if len(best) > 1 and mine == other else None


def _with_logprobs(ask: Ask) -> dict[str, Any]:
    body = {key: value for key, value in ask.body.items() if key not in ("stream", "stream_options")}
    if ask.path == CHAT:
        return body | {"logprobs": True, "top_logprobs": _CANDIDATES}
    return body | ({"logprobs": _CANDIDATES} if ask.path == COMPLETIONS else {"return_logprob": True, "top_logprobs_num": _CANDIDATES})


def fields(pairs: Sequence[Pair], exact_kinds: set[str], plan: Plan) -> Finding:
    """Names, types and, where the text is the same, values of everything else: how it ended, usage, log-probabilities."""
    rows, streamed = [], 0
    slack = max(TOLERANCE, plan.tie_margin)
    for pair in pairs:
        streamed += pair.ask.streamed
        ours, theirs = pair.texts()
        whole = pair.ask.kind in exact_kinds and ours == theirs
        found = differences(pair.left.answer, pair.right.answer, whole, slack)
        if bool(pair.left.invalid) != bool(pair.right.invalid):
            which = "candidate" if pair.right.invalid else "baseline"
            found.append(f"not of the openai package's types on the {which}: {pair.left.invalid or pair.right.invalid}")
        if found:
            rows.append([pair.ask.place, pair.ask.path, "yes" if pair.ask.streamed else "no", "; ".join(found[:3])])
    refused = sum(pair.refused for pair in pairs)
    line = f"{len(pairs) - len(rows)} of {len(pairs)} answers alike ({streamed} streamed, {refused} refused by both or either), {len(rows)} different"
    if rows:
        line += f"; first: {rows[0][0]}: {_short(rows[0][3])}"
    if len(pairs) == refused:
        rows, line = rows or [["all", "", "", "no request was answered by both"]], f"{line}; no request was answered by both"
    note = f"Log-probabilities may differ by {slack:g}. Ids, times, the model's name, the seed and figures of speculative decoding are not compared."
    tables = [Table("Differing fields", ("request", "path", "streamed", "differences (left: baseline)"), rows[:_SHOWN])] if rows else []
    return Finding("fields", not rows, line, tables, [note])


def scores(pairs: Sequence[Pair]) -> Finding:
    """Answers that contain what the file expects."""
    known = [pair for pair in pairs if pair.ask.expected is not None]
    if not known:
        return Finding("score", None, "no request of the file says what is expected")
    right = [[float(any(pair.ask.expected in text for text in pair.texts()[side])) for pair in known] for side in (0, 1)]
    found = difference(right[1], right[0])
    shares = [score(values) for values in right]
    line = (
        f"{100 * shares[0].mean:.1f} % right on the baseline, {100 * shares[1].mean:.1f} % on the candidate, of {len(known)}; "
        f"difference {100 * found.mean:+.1f} points, 95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f}"
    )
    return Finding("score", not found.high < 0, line)


def answered(pairs: Sequence[Pair], kind: str) -> list[Pair]:
    """Answered requests of a kind."""
    return [pair for pair in pairs if pair.ask.kind == kind and not pair.refused]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:80] + "..."


