"""Arms side by side: what is paired, what is pooled, and what the exit code says."""

import pytest

from idlm_sglang.quality import report, run, scores
from idlm_sglang.quality.client import Answer
from idlm_sglang.quality.harness import NotRun, Question, Scored, _collect
from idlm_sglang.quality.paper import Benchmark
from idlm_sglang.quality.statistics import Interval, Verdict

from .conftest import plan


class Kept:
    """What a model keeps of its answers."""

    def __init__(self, texts, final="x"):
        self.answers = {f"p{i}": [Answer(text, final and text, "stop", 3)] for i, text in enumerate(texts)}


def scored(values, prompt="p", better_high=True) -> Scored:
    questions = {("t", i, "h"): Question(("t", i, "h"), f"{prompt}{i}", list(value) if isinstance(value, tuple) else [value]) for i, value in enumerate(values)}
    return Scored("exact_match", questions, {"t": 1}, better_high)


def row(name, ar, isd, part_of=None, better_high=True, texts=None) -> scores.Row:
    same = Kept([f"a{i}" for i in range(len(ar))])
    models = {"ar": same, "isd": Kept(texts) if texts else same}
    return scores.row(Benchmark(name, "t", part_of=part_of), {"ar": scored(ar, better_high=better_high), "isd": scored(isd, better_high=better_high)}, models)


def test_questions_are_paired_and_texts_compared():
    made = row("b", [1, 0, 1, 1], [1, 1, 0, 1], texts=["a0", "other", "a2", "a3"])
    scores.compare([made], 0.03)
    (found,) = made.comparisons
    assert (found.won, found.lost, found.same_text, found.answers, found.questions) == (1, 1, 3, 4, 4)
    assert made.arms["ar"].mean.mean == 0.75 and found.difference.mean == 0


def test_repeats_count_as_one_question():
    made = row("b", [(1.0, 0.0), (1.0, 1.0)], [(1.0, 1.0), (1.0, 1.0)])
    assert made.arms["ar"].values == (0.5, 1.0) and made.arms["isd"].values == (1.0, 1.0)


def test_arms_that_were_asked_other_prompts_are_not_compared():
    models = {"ar": Kept(["a"]), "isd": Kept(["a"])}
    with pytest.raises(NotRun, match="not asked the same questions"):
        scores.row(Benchmark("b", "t"), {"ar": scored([1]), "isd": scored([1], prompt="q")}, models)


def test_a_reference_that_says_nothing_behind_its_thinking_is_no_score():
    models = {"ar": Kept(["thought"], final=""), "isd": Kept(["b"])}
    with pytest.raises(NotRun, match="nothing behind its thinking"):
        scores.row(Benchmark("b", "t"), {"ar": scored([0]), "isd": scored([1])}, models)


def test_a_benchmark_inside_another_counts_once_in_the_whole():
    rows = [row("GPQA-D", [1] * 50, [1] * 50, part_of="GPQA"), row("GPQA", [1] * 100, [1] * 100), row("IFEval", [0] * 30, [0] * 30)]
    (whole,) = scores.compare(rows, 0.03)
    assert whole.questions == 130
    (alone,) = scores.compare(rows[:1], 0.03)
    assert alone.questions == 50


def test_where_low_is_good_a_higher_score_is_worse():
    made = row("ppl", [0] * 60, [1] * 60, better_high=False)
    assert not scores.compare([made], 0.03) and made.comparisons[0].verdict.word == "worse"


@pytest.mark.parametrize(
    ("isd", "code"), [([1] * 200, run.FINE), ([1] * 100 + [0] * 100, run.FOUND_WORSE), ([1] * 20, run.OPEN)], ids=["parity", "worse", "undecided"]
)
def test_the_exit_code_says_what_was_decided(isd, code):
    made = [row("b", [1] * len(isd), isd)]
    assert run._code(made, scores.compare(made, 0.03)) == code


def test_one_worse_benchmark_is_enough_for_the_exit_code():
    made = [row("a", [1] * 4000, [1] * 4000), row("b", [1] * 40, [0] * 20 + [1] * 20)]
    whole = scores.compare(made, 0.03)
    assert whole[0].verdict.word == "parity" and run._code(made, whole) == run.FOUND_WORSE


def test_a_metric_without_one_number_per_question_is_refused_by_name():
    samples = [{"filter": "none", "metrics": ["f1"], "f1": (1, 2), "doc_id": 0, "doc_hash": "h", "arguments": [["p"]]}]
    with pytest.raises(NotRun, match="t has no score per question: it has f1"):
        _collect({"samples": {"t": samples}, "higher_is_better": {}, "versions": {}}, "", None)


def test_the_published_score_stands_beside_with_no_verdict():
    made = [row("MATH-500", [1] * 99 + [0], [1] * 60 + [0] * 40)]
    pooled = scores.compare(made, 0.03)
    fingerprint = run._fingerprint(plan("--suite", "paper"), {name: run.Served("m", None, {}) for name in ("ar", "isd")}, [])
    text = report.markdown(plan("--suite", "paper"), fingerprint, made, pooled, {"MathBench": "unavailable in lm-eval"})
    line = next(line for line in text.splitlines() if line.startswith("| MATH-500 | exact_match"))
    assert line.endswith("| 96.8 | within | below |")
    assert "| MathBench | unavailable in lm-eval |" in text


def test_verdicts_are_said_in_words():
    assert report.said(Verdict("parity")) == "parity"
    assert "about 5 more questions" in report.said(Verdict("undecided", 5)) and "no number" in report.said(Verdict("undecided", None))
    assert report._interval(Interval(0.5, 0.25, 0.75), "+") == "+50.0 [+25.0, +75.0]"


def test_keys_given_on_the_command_line_stay_out_of_the_report():
    made = run._fingerprint(plan("--suite", "demo"), {name: run.Served("m", None, {}) for name in ("ar", "isd")}, ["--api-key", "abc", "--api-key=def"])
    assert "abc" not in made["command"] and "def" not in made["command"]
