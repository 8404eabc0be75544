"""The paper's benchmarks as tasks of lm-eval: data, targets and scoring are lm-eval's, the prompts have the published form.

Published form: one user turn without examples; the question, lettered options, and how the answer is to be given. The
wording here is our own. lm-eval's own prompts for these tasks begin the answer for the model, show examples without thinking,
or cut the answer at strings that a chat model writes: none of them suits a model that thinks.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_LETTER = 'Think it through step by step. Finish with the line "The answer is (X)", where X is the letter of the right option.'
_BOXED = "Reason step by step, and give the final answer inside \\boxed{}."
_CHOSEN = r"(?i:answer)(?i:\s+is)?\s*:?\s*\**\s*\(?\**([A-J])\b|\\boxed\{\s*(?:\\text\{)?\s*\(?([A-J])\b"


def letter_filter() -> list[dict[str, Any]]:
    """The last letter that an answer names as its choice."""
    return [{"name": "letter", "filter": [{"function": "regex", "regex_pattern": _CHOSEN, "group_select": -1}, {"function": "take_first"}]}]


def boxed_or_last_number(text: str) -> str:
    """The number in the last box, else the last number, without thousands' commas."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", boxed[-1] if boxed else text)
    return numbers[-1].replace(",", "") if numbers else "[none]"


def last_code(text: str) -> str:
    """The last fenced block of an answer that has one, else the answer."""
    blocks = re.findall(r"```(?:[Pp]ython3?|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return blocks[-1] if blocks else text


def _numbers(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    return [[boxed_or_last_number(text) for text in answers] for answers in resps]


def _codes(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    return [[last_code(text) for text in answers] for answers in resps]


def _functions(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    # The prompt is a function without a body: kept for its imports and helpers, the answer defines it again.
    return [[doc["prompt"] + "\n" + last_code(text) for text in answers] for answers, doc in zip(resps, docs)]


def _custom(function: Callable, *then: str) -> list[dict[str, Any]]:
    return [{"name": "extracted", "filter": [{"function": "custom", "filter_fn": function}, *({"function": name} for name in then)]}]


def _options(question: str, options: str) -> str:
    lines = "{% for option in " + options + " %}{{'ABCDEFGHIJ'[loop.index0]}}. {{option}}\n{% endfor %}"
    return "{{" + question + ".strip()}}\n\n" + lines + "\n" + _LETTER


def _needs_punkt() -> str:
    """Why IFEval cannot be scored, or empty."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return "nltk's punkt_tab (python -m nltk.downloader punkt_tab)"
    return ""


@dataclass(frozen=True)
class Benchmark:
    """One row of the comparison.

    Attributes:
        name: as published.
        task: lm-eval's task or group, or None where it has none.
        metric: what of its scores is compared.
        settings: what is changed in lm-eval's task.
        runs_code: it runs the code that models write.
        missing: says what else is not at hand, or nothing.
        part_of: the benchmark whose questions include these.
    """

    name: str
    task: str | None
    metric: str = "exact_match"
    settings: dict[str, Any] = field(default_factory=dict)
    runs_code: bool = False
    missing: Callable[[], str] | None = None
    part_of: str | None = None


# Where lm-eval keeps these tasks, below its `tasks`: reading all 14,000 takes seconds.
FOLDERS = ("arc", "mmlu/generative", "mmlu_pro", "gpqa/cot_zeroshot", "gsm8k", "minerva_math", "aime", "humaneval", "mbpp", "ifeval")

_PLAIN = {"num_fewshot": 0, "description": "", "gen_prefix": None, "fewshot_config": None}
_STOPLESS = {"generation_kwargs": {"until": [], "do_sample": True}}
_CHOICE = _PLAIN | _STOPLESS | {"filter_list": letter_filter()}
_MATHS = _PLAIN | _STOPLESS
_GPQA = _CHOICE | {"doc_to_text": _options("Question", "choices")}

PAPER = (
    Benchmark("ARC-C", "arc_challenge_chat", settings=_CHOICE | {"doc_to_text": _options("question", "choices.text")}),
    Benchmark("MMLU", "mmlu_generative", settings=_CHOICE | {"doc_to_text": _options("question", "choices")}),
    Benchmark("MMLU-Pro", "mmlu_pro", settings=_CHOICE | {"doc_to_text": _options("question", "options")}),
    Benchmark("GPQA-D", "gpqa_diamond_cot_zeroshot", settings=_GPQA, part_of="GPQA"),
    Benchmark("GPQA", "gpqa_main_cot_zeroshot", settings=_GPQA),
    Benchmark("GSM8K", "gsm8k_cot", settings=_MATHS | {"doc_to_text": "{{question}}\n" + _BOXED, "filter_list": _custom(_numbers, "take_first")}),
    Benchmark("MATH-500", "minerva_math500", "math_verify", settings=_MATHS | {"doc_to_text": "{{problem}}\n" + _BOXED}),
    Benchmark("MathBench", None),
    Benchmark("AIME-24", "aime24", settings=_MATHS | {"doc_to_text": "{{Problem}}\n" + _BOXED}),
    Benchmark("AIME-25", "aime25", settings=_MATHS | {"doc_to_text": "{{problem}}\n" + _BOXED}),
    Benchmark("HumanEval", "humaneval_instruct", "pass@1", settings=_PLAIN | _STOPLESS | {"filter_list": _custom(_functions)}, runs_code=True),
    Benchmark("MBPP", "mbpp_instruct", "pass_at_1", settings=_PLAIN | _STOPLESS | {"filter_list": _custom(_codes)}, runs_code=True),
    Benchmark("LiveCodeBench-v6", None),
    Benchmark("IFEval", "ifeval", "prompt_level_strict_acc", settings=_PLAIN | _STOPLESS, missing=_needs_punkt),
)
