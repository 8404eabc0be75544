"""Made-up questions in the shape of the benchmarks' data sets, laid out as the hub's repositories are."""

import json
from pathlib import Path

_FIELDS = "biology business chemistry economics engineering health history law math other philosophy physics psychology"
MMLU_PRO_SUBJECTS = [*_FIELDS.split(), "computer science"]


def lay_out(root: Path, mmlu_subjects: list[str]) -> Path:
    """Write one or two questions per data set under ``root``. ``mmlu_subjects``: the configurations that MMLU has."""
    four = {"label": list("ABCD"), "text": ["red", "blue", "green", "grey"]}
    arc = [{"question": "Which colour has a clear sky?", "choices": four, "answerKey": "2"}]
    _write(root / "allenai/ai2_arc", {"ARC-Challenge": {"train": arc, "validation": arc, "test": arc}})
    mmlu = [{"question": "Which colour has grass?", "choices": four["text"], "answer": 2}]
    _write(root / "cais/mmlu", {name: {"test": mmlu, "dev": mmlu} for name in mmlu_subjects})
    pro = [
        {"question": f"Which one of {subject}?", "options": list("abcdef"), "answer": "F", "answer_index": 5, "cot_content": "", "category": subject}
        for subject in MMLU_PRO_SUBJECTS
    ]
    _write(root / "TIGER-Lab/MMLU-Pro", {"default": {"test": pro, "validation": pro}})
    wrong = {f"Incorrect Answer {i}": word for i, word in enumerate(("one", "two", "three"), 1)}
    gpqa = [{"Question": "What is two and two?", "Correct Answer": "four"} | wrong]
    _write(root / "Idavidrein/gpqa", {"gpqa_diamond": {"train": gpqa}, "gpqa_main": {"train": gpqa}})
    pens = [{"question": "A box has 600 pens, and another as many. How many?", "answer": "600 * 2 = 1200\n#### 1,200"}]
    _write(root / "openai/gsm8k", {"main": {"test": pens}})
    maths = [{"problem": "Halve 1.", "solution": "Half of it: $\\boxed{\\frac{1}{2}}$", "answer": "\\frac{1}{2}"}]
    _write(root / "HuggingFaceH4/MATH-500", {"default": {"test": maths}})
    _write(root / "Maxwell-Jia/AIME_2024", {"default": {"train": [{"Problem": "Add 200 and 4.", "Answer": 204}]}})
    _write(root / "math-ai/aime25", {"default": {"test": [{"problem": "Add 70 and 0.", "answer": "70"}]}})
    return root


def _write(folder: Path, configurations: dict[str, dict[str, list[dict]]]) -> None:
    folder.mkdir(parents=True)
    lines = ["---", "configs:"]
    written: dict[str, str] = {}
    for name, splits in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, rows in splits.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            # Configurations with the same questions share a file.
            file = written.setdefault(text, f"{len(written)}.jsonl")
            (folder / file).write_text(text)
            lines += [f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


_CODE_EVAL = '''
import datasets
import evaluate


class CodeEval(evaluate.Metric):
    """Runs the few trusted answers of these tests; the hub's metric of this name is not at hand offline."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, k):
        passed = [self._passes(each[0], reference) for each, reference in zip(predictions, references)]
        return {"pass@1": sum(passed) / len(passed)}, {}

    @staticmethod
    def _passes(program, reference):
        try:
            exec(program + "\\n" + reference, {})
        except Exception:
            return False
        return True
'''


def lay_out_code(root: Path) -> Path:
    """The data sets of HumanEval and MBPP, and what scores them."""
    prompt = 'import math\n\n\ndef halve(x):\n    """Half of x, rounded down."""\n'
    check = "def check(f):\n    assert f(9) == 4\n"
    humaneval = [{"task_id": "0", "prompt": prompt, "test": check, "entry_point": "halve", "canonical_solution": ""}]
    _write(root / "openai/openai_humaneval", {"default": {"test": humaneval}})
    asserts = ["assert halve(9) == 4", "assert halve(2) == 1", "assert halve(0) == 0"]
    mbpp = [{"task_id": 11, "text": "Write a function halve(x).", "code": "", "test_list": asserts}]
    _write(root / "google-research-datasets/mbpp", {"full": {"test": mbpp}})
    (root / "code_eval").mkdir()
    (root / "code_eval/code_eval.py").write_text(_CODE_EVAL.lstrip())
    return root
