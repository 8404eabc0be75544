"""Arms side by side: what each got in a benchmark, and how it differs from the reference, question by question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from idlm_sglang.quality import statistics
from idlm_sglang.quality.harness import NotRun, Scored
from idlm_sglang.quality.paper import Benchmark
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
    """A benchmark that was run.

    Attributes:
        keys: the questions, in the order of every arm's values.
        same_text: by arm, how many of its answers are the reference's.
        part_of: the benchmark whose questions include these.
        comparisons: the arms beside the reference; :func:`compare` fills them in.
    """

    name: str
    task: str
    metric: str
    versions: dict[str, object]
    better_high: bool
    arms: dict[str, ArmScore]
    keys: list[tuple[str, int, str]]
    same_text: dict[str, int]
    part_of: str | None = None
    comparisons: list[Comparison] = field(default_factory=list)


def row(benchmark: Benchmark, scored: Mapping[str, Scored], models: Mapping[str, "ChatModel"]) -> Row:
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
    same = {other: _same(answers[reference], answers[other]) for other in others}
    return Row(benchmark.name, benchmark.task, first.metric, first.versions, first.better_high, arms, keys, same, benchmark.part_of)


def compare(rows: Sequence[Row], margin: float) -> list[Comparison]:
    """Compare in every row, and over the questions of all together, each counting once; those are returned.

    Left out of the whole are benchmarks where low is good and those that are a part of another that was run.
    """
    if not rows:
        return []
    reference, *others = rows[0].arms
    whole = [each for each in rows if each.better_high and each.part_of not in {other.name for other in rows}]
    among = len(others) * (len(rows) + (len(whole) > 1))
    for each in rows:
        each.comparisons = [_compare(other, [each], reference, margin, among) for other in others]
    return [_compare(other, whole, reference, margin, among) for other in others] if whole else []


def _compare(arm: str, rows: Sequence[Row], reference: str, margin: float, among: int) -> Comparison:
    a, r = (np.concatenate([each.arms[name].values for each in rows]) for name in (arm, reference))
    found, verdict = statistics.verdict(a, r, margin, among)
    if not rows[0].better_high and verdict.word in (BETTER, WORSE):
        verdict = Verdict(WORSE if verdict.word == BETTER else BETTER)
    same, answers = sum(each.same_text[arm] for each in rows), sum(each.arms[arm].answers for each in rows)
    return Comparison(arm, found, verdict, len(a), int(np.sum(a > r)), int(np.sum(a < r)), same, answers)


def _same(left: Mapping[str, list["Answer"]], right: Mapping[str, list["Answer"]]) -> int:
    return sum(a.text == b.text and a.finish == b.finish for prompt in left for a, b in zip(left[prompt], right[prompt]))
