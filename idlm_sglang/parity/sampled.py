"""Sampled answers: whether both servers draw from one distribution."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

from idlm_sglang.parity.endpoint import Side, chosen, texts
from idlm_sglang.parity.findings import Finding, Table
from idlm_sglang.parity.options import Plan
from idlm_sglang.parity.prompts import SAMPLED, SEEDED, Ask
from idlm_sglang.parity.statistics import holm, two_sample
from idlm_sglang.serving.replay import CHAT, COMPLETIONS

TOKENS = 6  # of each answer
_END = ""  # where an answer has ended
VIEWS = {f"token {i + 1}": (lambda sample, i=i: sample[i]) for i in range(TOKENS)} | {
    f"tokens {i + 1} and {i + 2}": (lambda sample, i=i: sample[i : i + 2]) for i in range(TOKENS - 1)
}
# Left out of the bodies, so that an answer is one choice that comes at once.
_DROPPED = ("stream", "stream_options", "n", "best_of", "seed", "logprobs", "top_logprobs", "max_tokens", "max_completion_tokens", "echo")


def compare(asks: Sequence[Ask], seeded_too: bool, left: Side, right: Side, plan: Plan) -> Finding:
    """``plan.samples`` answers of each side to some prompts, in turn; chi-square on tokens and pairs of tokens, Holm over all.

    ``seeded_too``: seeded requests are compared so as well, under seeds 0, 1, ...
    """
    if not plan.samples:
        return Finding("sampled", None, "left out (--samples 0)")
    wanted = (SAMPLED, SEEDED) if seeded_too else (SAMPLED,)
    some = [ask for ask in asks if ask.kind in wanted and ask.path in (CHAT, COMPLETIONS) and isinstance(ask.body.get("prompt", ""), str)]
    # In turn from both kinds, where there are both.
    by_kind = [[ask for ask in some if ask.kind == kind] for kind in wanted]
    some = [ask for turn in zip_longest(*by_kind) for ask in turn if ask is not None][: plan.sampled_prompts]
    if not some:
        return Finding("sampled", None, "no request of the file is sampled")
    names, p_values, cells, rows = [], [], [], []
    for ask in some:
        ours, theirs = draw(ask, left, right, plan)
        for view, seen in VIEWS.items():
            p, count = two_sample(ours, theirs, seen)
            if count > 1:
                names.append((ask.place, ask.kind, view))
                p_values.append(p)
                cells.append(count)
    if not p_values:
        return Finding("sampled", None, f"{len(some)} prompts, {plan.samples} answers a side: nearly all the same, nothing to test")
    adjusted = holm(p_values)
    rows = [[*name, count, f"{p:.4g}", f"{q:.4g}"] for name, count, p, q in sorted(zip(names, cells, p_values, adjusted), key=lambda row: row[2])]
    passed = min(adjusted) >= plan.alpha
    others = sum(ask.kind in wanted for ask in asks) - len(some)
    line = f"{len(some)} prompts ({others} more not drawn from), {plan.samples} answers a side, {len(p_values)} tests: smallest corrected p {min(adjusted):.3g} (parity from {plan.alpha:g})"
    if not passed:
        line += f"; first: {rows[0][0]}, {rows[0][2]}"
    note = f"Equal distributions fail here in at most {plan.alpha:g} of the runs (Holm over all tests)."
    return Finding("sampled", passed, line, [Table("Two-sample chi-square tests", ("request", "kind", "of", "cells", "p", "p corrected"), rows[:40])], [note])


def draw(ask: Ask, left: Side, right: Side, plan: Plan) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Both sides' answers, as ``TOKENS`` tokens each; words where a server gives no tokens."""
    body = {key: value for key, value in ask.body.items() if key not in _DROPPED} | {"max_tokens": TOKENS}
    body |= {"logprobs": True, "top_logprobs": 0} if ask.path == CHAT else {"logprobs": 1}

    def one(side: Side, i: int) -> tuple[str, ...]:
        asked: dict[str, Any] = body | ({"seed": i} if ask.kind == SEEDED else {})
        reply = side.ask(ask, asked)
        if reply.answer.status != 200:
            raise side.failed(f"refuses {ask.place} as a sampled request: HTTP {reply.answer.status}")
        tokens = [name for choice in chosen(ask.path, reply.answer.tree)[:1] for name, _ in choice]
        tokens = tokens or "".join(texts(ask.path, reply.answer.tree)[:1]).split()
        return (*tokens, *[_END] * TOKENS)[:TOKENS]

    with ThreadPoolExecutor(plan.concurrency) as first, ThreadPoolExecutor(plan.concurrency) as second:
        ours = [first.submit(one, left, i) for i in range(plan.samples)]
        theirs = [second.submit(one, right, i) for i in range(plan.samples)]
        return [f.result() for f in ours], [f.result() for f in theirs]
