"""Arms side by side: what each got in a benchmark, and how it differs from the reference, question by question."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from idlm_sglang.quality import statistics
from idlm_sglang.quality.harness import NotRun, Scored
from idlm_sglang.quality.statistics import BETTER, WORSE, Interval, Verdict

if TYPE_CHECKING:
    from idlm_sglang.quality.client import Answer, ChatModel

ALL = "all questions"
CUT = "length"  # the finish reason of an answer ended by the limit of tokens


@dataclass(frozen=True)
class ArmScore:
    """An arm in a benchmark.

    Attributes:
        values: score of each question, the mean over repeats.
        cut_off: answers ended by the limit of tokens.
        empty: answers with nothing behind the thinking, which score as wrong.
        tokens: completion tokens of all answers.
    """

    values: tuple[float, ...]
    mean: Interval
    answers: int
    cut_off: int
    empty: int
    tokens: int


@dataclass(frozen=True)
class Comparison:
    """An arm beside the reference.

    Attributes:
        difference: arm minus reference, as a share; positive is higher.
        won, lost: questions on which the arm scored higher, and lower.
        same_text: answers with identical text, thinking included, of ``answers``.
    """

    arm: str
    difference: Interval
    verdict: Verdict
    questions: int
    won: int
    lost: int
    same_text: int
    answers: int


@dataclass
class Row:
    """A benchmark that was run."""

    name: str
    task: str
    metric: str
    versions: dict[str, object]
    better_high: bool
    arms: dict[str, ArmScore]
    comparisons: list[Comparison] = field(default_factory=list)
    keys: list[tuple[str, int, str]] = field(default_factory=list)


def row(name: str, task: str, scored: Mapping[str, Scored], models: Mapping[str, "ChatModel"], margin: float) -> Row:
    """One benchmark's arms, the reference first.

    Raises:
        NotRun: the arms were not asked the same, or the reference answered nothing.
    """
    reference, *others = scored
    first = scored[reference]
    keys = list(first.questions)
    for other in others:
        if {key: q.prompt for key, q in scored[other].questions.items()} != {key: q.prompt for key, q in first.questions.items()}:
            raise NotRun(f"{other} was not asked the same questions as {reference}: the task builds its prompts at random")
    prompts = list(dict.fromkeys(first.questions[key].prompt for key in keys))
    answers = {arm: {prompt: models[arm].answers[prompt] for prompt in prompts} for arm in scored}
    arms = {}
    for arm, found in scored.items():
        values = tuple(float(np.mean(found.questions[key].scores)) for key in keys)
        said = [answer for each in answers[arm].values() for answer in each]
        cut, empty = sum(answer.finish == CUT for answer in said), sum(not answer.final for answer in said)
        if empty == len(said) and arm == reference:
            raise NotRun(f"{arm} wrote nothing behind its thinking in {empty} answers: --thinking off if it does not think, else more --max-tokens")
        arms[arm] = ArmScore(values, statistics.score(values), len(said), cut, empty, sum(answer.tokens for answer in said))
    made = Row(name, task, first.metric, first.versions, first.better_high, arms, keys=keys)
    for other in others:
        same, total = _same(answers[reference], answers[other])
        made.comparisons.append(_compare(other, arms[other].values, arms[reference].values, margin, first.better_high, same, total))
    return made


def together(rows: list[Row], margin: float) -> list[Comparison]:
    """Each arm over the questions of all benchmarks, every question counting once; those where low is good left out."""
    rows = [each for each in rows if each.better_high]
    if not rows:
        return []
    reference, *others = rows[0].arms
    pooled = {arm: np.concatenate([each.arms[arm].values for each in rows]) for arm in rows[0].arms}
    made = []
    for i, other in enumerate(others):
        same, total = (sum(getattr(each.comparisons[i], what) for each in rows) for what in ("same_text", "answers"))
        made.append(_compare(other, pooled[other], pooled[reference], margin, True, same, total))
    return made


def _compare(arm: str, values, reference, margin: float, better_high: bool, same: int, answers: int) -> Comparison:
    a, r = np.asarray(values), np.asarray(reference)
    found, verdict = statistics.verdict(a, r, margin)
    if not better_high and verdict.word in (BETTER, WORSE):
        verdict = Verdict(WORSE if verdict.word == BETTER else BETTER)
    return Comparison(arm, found, verdict, len(a), int(np.sum(a > r)), int(np.sum(a < r)), same, answers)


def _same(left: Mapping[str, list["Answer"]], right: Mapping[str, list["Answer"]]) -> tuple[int, int]:
    pairs = [(a, b) for prompt in left for a, b in zip(left[prompt], right[prompt])]
    return sum(a.text == b.text and a.finish == b.finish for a, b in pairs), len(pairs)
