"""The paper's benchmarks through lm-eval, on made-up questions in the shape of their data sets."""

import re

import pytest

from idlm_sglang.quality import paper, published
from idlm_sglang.quality.harness import UNAVAILABLE, Harness, NotRun, _file

from . import hub
from .conftest import plan

_HALVE = "Here it is:\n```python\ndef halve(x):\n    return {}\n```\nIt rounds down."


def _letter_of(option: str):
    def say(messages):
        letter = re.search(rf"([A-J])\. {option}\b", messages[-1]["content"]).group(1)
        return f"Looking at each in turn.\n\nThe answer is ({letter})."

    return say


# A right and a wrong answer, as a function of the messages.
ANSWERS = {
    "ARC-C": (_letter_of("blue"), _letter_of("red")),
    "MMLU": (_letter_of("green"), _letter_of("red")),
    "MMLU-Pro": (_letter_of("f"), _letter_of("a")),
    "GPQA-D": (_letter_of("four"), _letter_of("two")),
    "GPQA": (_letter_of("four"), _letter_of("two")),
    "GSM8K": (lambda _: "600 + 600 gives \\boxed{1,200} pens, for 2 boxes.", lambda _: "\\boxed{600}"),
    "MATH-500": (lambda _: "That is $\\boxed{0.5}$.", lambda _: "That is $\\boxed{2}$."),
    "AIME-24": (lambda _: "So \\(\\boxed{204}\\).", lambda _: "So \\(\\boxed{203}\\)."),
    "AIME-25": (lambda _: "**Answer:** $\\boxed{70}$", lambda _: "**Answer:** $\\boxed{7}$"),
    "HumanEval": (lambda _: _HALVE.format("math.floor(x / 2)"), lambda _: _HALVE.format("x / 2")),
    "MBPP": (lambda _: _HALVE.format("x // 2"), lambda _: _HALVE.format("x")),
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """lm-eval with the paper's benchmarks, their data in a directory."""
    root = tmp_path_factory.mktemp("hub")
    made = Harness(plan("--suite", "paper", "--data-dir", str(root), "--confirm-run-unsafe-code"))
    assert len(made.leaves("mmlu_pro")) == 14
    subjects = [_file(made._manager.task_index[leaf])["dataset_name"] for leaf in made.leaves("mmlu_generative")]
    assert len(subjects) == 57
    hub.lay_out_code(hub.lay_out(root, subjects))
    return made


def test_the_suite_has_every_benchmark_with_a_published_figure_and_no_other():
    assert tuple(each.name for each in paper.PAPER) == published.BENCHMARKS
    assert len(published.BENCHMARKS) == 14
    assert {each.name for each in paper.PAPER if each.task is None} == {"MathBench", "LiveCodeBench-v6"}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_right_answer_scores_and_a_wrong_one_does_not(name, suite, scripted, monkeypatch):
    benchmark = next(each for each in paper.PAPER if each.name == name)
    # Three of MMLU's 57 subjects and of MMLU-Pro's 14: loading them all takes seconds and shows no more.
    monkeypatch.setattr(suite, "leaves", lambda task: Harness.leaves(suite, task)[:3])
    tasks = suite.load(benchmark)
    for say, expected in zip(ANSWERS[name], (1.0, 0.0)):
        model = scripted(say)
        scored = suite.ask(tasks, model, benchmark)
        assert len(model.asked) == len(tasks)
        assert [question.scores for question in scored.questions.values()] == [[expected]] * len(tasks)
    # One user turn and no stop string: nothing that would begin, or cut, the answer of a model that thinks.
    for messages, settings in model.asked:
        assert [message["role"] for message in messages] == ["user"] and settings["until"] == []
    print(f"{name}: {len(tasks)} task(s) of lm-eval, {scored.metric}")


def test_what_cannot_be_run_says_why(suite):
    why = {}
    careful = Harness.__new__(Harness)
    careful.__dict__ |= suite.__dict__ | {"_plan": plan("--suite", "paper")}
    for benchmark in paper.PAPER:
        with pytest.raises(NotRun) as caught:
            careful.load(benchmark)
        why[benchmark.name] = str(caught.value)
    assert why["MathBench"] == why["LiveCodeBench-v6"] == UNAVAILABLE
    assert "--confirm-run-unsafe-code" in why["HumanEval"] and "--confirm-run-unsafe-code" in why["MBPP"]
    rest = set(why) - {"MathBench", "LiveCodeBench-v6", "HumanEval", "MBPP"}
    assert all(why[name].startswith("data not at hand: ") and "\n" not in why[name] for name in rest), why


@pytest.mark.parametrize(
    "text",
    [
        "The answer is (C).",
        "The answer is **C**",
        "**Answer: C**",
        "answer is: **(C)**",
        "Not (B). The answer is (B), no: the answer is (C).",
        r"\boxed{C}",
        r"\boxed{\text{C}}",
    ],
)
def test_the_letter_is_read_in_the_ways_models_write_it(text):
    assert _read_letter(text) == "C"


@pytest.mark.parametrize("text", ["", "I answer with care about Cats.", "The answer is Carbon dioxide"])
def test_no_letter_is_read_where_none_is_chosen(text):
    assert _read_letter(text) == "[invalid]"


def _read_letter(text: str) -> str:
    from lm_eval.filters.extraction import RegexFilter

    settings = dict(paper.letter_filter()[0]["filter"][0])
    settings.pop("function")
    return RegexFilter(**settings).apply([[text]], [{}])[0][0]


def test_code_and_numbers_are_taken_from_where_they_are_final():
    assert paper.last_code("```python\na\n```\nbetter:\n```python\nb\n```") == "b\n"
    assert paper.last_code("def f(): pass") == "def f(): pass"
    assert paper.boxed_or_last_number("first 3, then 4,500.25") == "4500.25"
    assert paper.boxed_or_last_number("none at all") == "[none]"
