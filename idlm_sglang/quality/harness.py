"""lm-eval's side: which tasks there are, loading them, asking an arm, one score per question."""

import contextlib
import difflib
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idlm_sglang.config import SettingError
from idlm_sglang.quality.options import DEMO, PAPER, Plan
from idlm_sglang.quality.paper import FOLDERS, Benchmark
from idlm_sglang.quality.paper import PAPER as PAPER_BENCHMARKS

if TYPE_CHECKING:
    from idlm_sglang.quality.client import ChatModel

TASKS_DIR = Path(__file__).parent / "tasks"
DEMO_TASKS = ("idlm_demo_sums", "idlm_demo_words", "idlm_demo_facts")
_SEED = 0  # of what lm-eval draws: examples and the order of options
_ANY = ""  # the first metric of a task
UNAVAILABLE = "unavailable in lm-eval"


class NotRun(Exception):
    """A benchmark that cannot be run here: why, in one line."""


@dataclass
class Question:
    """One question's scores under one metric, an answer each, and whether a high score is good."""

    key: tuple[str, int, str]
    prompt: str
    scores: list[float] = field(default_factory=list)


@dataclass
class Scored:
    """What an arm got in a benchmark.

    Attributes:
        metric: the compared one, with lm-eval's name of the filter where the task has several.
        questions: by (task, number, hash of the document).
        versions: lm-eval's version of each task.
        better_high: a higher score is better.
    """

    metric: str
    questions: dict[tuple[str, int, str], Question]
    versions: dict[str, Any]
    better_high: bool


def prepare(plan: Plan) -> None:
    """Settings that lm-eval and its libraries read when they are imported. Raises :class:`SettingError` without lm-eval."""
    if not plan.download:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    if plan.unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    if not plan.verbose:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise SettingError(f"lm-eval cannot be imported ({error}); install it with: pip install 'idlm-sglang[eval]'") from None
    for name in ("lm_eval", "datasets", "evaluate", "httpx", "openai"):
        logging.getLogger(name).setLevel(logging.INFO if plan.verbose else logging.CRITICAL)


class Harness:
    """lm-eval's tasks, those of the suites and those of the user."""

    def __init__(self, plan: Plan):
        import lm_eval.tasks

        self._plan = plan
        theirs = Path(lm_eval.tasks.__file__).parent
        own = {DEMO: [TASKS_DIR], PAPER: [theirs / folder for folder in FOLDERS]}.get(plan.suite, [])
        self._manager = lm_eval.tasks.TaskManager(include_path=[*own, *plan.include] or None, include_defaults=not own)

    def benchmarks(self) -> list[Benchmark]:
        """The rows of the comparison. Raises :class:`SettingError` for a task that nobody knows."""
        if self._plan.suite == PAPER:
            return list(PAPER_BENCHMARKS)
        names = DEMO_TASKS if self._plan.suite == DEMO else self._plan.tasks
        for name in names:
            if name not in self._manager.task_index:
                close = difflib.get_close_matches(name, self._manager.all_tasks, 3, 0.5)
                such = f" such as {', '.join(close)}" if close else ""
                raise SettingError(f"--tasks {name} is not known to lm-eval; allowed: its tasks{such}, or --include-path")
        return [Benchmark(name, name, _ANY) for name in names]

    def load(self, benchmark: Benchmark) -> list:
        """The benchmark's tasks of lm-eval with their data. Raises :class:`NotRun`."""
        entry = self._manager.task_index.get(benchmark.task) if benchmark.task else None
        if entry is None:
            raise NotRun(UNAVAILABLE)
        if not self._plan.unsafe_code and (benchmark.runs_code or self._runs_code(entry)):
            raise NotRun("runs code that models write: --confirm-run-unsafe-code consents")
        if benchmark.missing and (what := benchmark.missing()):
            raise NotRun(f"data not at hand: {what}")
        spec: Any = benchmark.task
        if benchmark.settings:
            spec = {"group": "paper", "task": [{"task": leaf, **benchmark.settings} for leaf in self.leaves(benchmark.task)]}
        try:
            # Some tasks shuffle their options while they load.
            random.seed(_SEED)
            with _inside(self._plan.data):
                tasks = list(self._manager.load([spec])["tasks"].values())
        except ModuleNotFoundError as error:
            raise NotRun(f"needs a package: {_line(error)}; pip install 'idlm-sglang[eval]'") from None
        except Exception as error:
            # Data sets fail in as many ways as there are libraries behind them; the reason is printed.
            raise NotRun(f"data not at hand: {_line(error)}{'' if self._plan.download else '; --data-dir or --download'}") from error
        for task in tasks:
            if task.config.num_fewshot is None:
                task.set_config("num_fewshot", 0)
            if task.OUTPUT_TYPE != "generate_until":
                raise NotRun(f"{task.config.task} needs log-likelihoods, which chat endpoints do not give")
            if task.config.gen_prefix and self._plan.thinking == "on":
                raise NotRun(f"{task.config.task} begins the answer for the model, which leaves no thinking: --thinking off or model")
        return tasks

    def ask(self, tasks: list, model: "ChatModel", benchmark: Benchmark) -> Scored:
        """Ask an arm every question, ``repeats`` times.

        Raises:
            EndpointError: the endpoint failed.
            NotRun: lm-eval could not build the prompts or score the answers.
        """
        from lm_eval import evaluate

        from idlm_sglang.quality.endpoint import EndpointError

        found: Scored | None = None
        for model.round in range(self._plan.repeats):
            try:
                with _inside(self._plan.data), _quiet(self._plan.verbose):
                    for task in tasks:
                        task.set_fewshot_seed(_SEED)
                    results = evaluate(
                        model,
                        {"tasks": {task.task_name: task for task in tasks}},
                        limit=self._plan.limit,
                        bootstrap_iters=0,
                        apply_chat_template=True,
                        fewshot_as_multiturn=True,
                        confirm_run_unsafe_code=self._plan.unsafe_code,
                    )
            except EndpointError:
                raise
            except Exception as error:
                raise NotRun(f"lm-eval cannot score it: {type(error).__name__}: {_line(error)}") from None
            found = _collect(results, benchmark.metric, found)
        return found

    def leaves(self, name: str) -> list[str]:
        """The tasks of a group, by their files: lm-eval gives changed settings on to the tasks of a group by name only."""
        entry = self._manager.task_index[name]
        if entry.tags and entry.kind.name == "TAG":
            return sorted(entry.tags)
        return self._members(_file(entry)["task"]) if entry.kind.name == "GROUP" else [name]

    def _members(self, items: list) -> list[str]:
        found = []
        for item in items:
            inner = item.get("task", item.get("group")) if isinstance(item, dict) else item
            found += self._members(inner) if isinstance(inner, list) else self.leaves(inner)
        return found

    @staticmethod
    def _runs_code(entry) -> bool:
        return bool(_file(entry).get("unsafe_code"))


def _file(entry) -> dict[str, Any]:
    """A task's file with what it includes; functions that it names are not imported."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(entry.yaml_path, resolve_func=False, recursive=True) if entry.yaml_path else entry.cfg or {}


def _collect(results: dict[str, Any], metric: str, found: Scored | None) -> Scored:
    """One number per question of the metric that is compared: the named one, else a task's first that has such numbers."""
    for task, samples in results["samples"].items():
        filters = list(dict.fromkeys(sample["filter"] for sample in samples))
        chosen = metric or next((name for name in samples[0]["metrics"] if _number(samples[0][name]) is not None), None)
        if chosen is None or _number(samples[0].get(chosen)) is None:
            raise NotRun(f"{task} has no score per question{f' named {metric}' if metric else ''}: it has {', '.join(samples[0]['metrics'])}")
        # The last filter is the most lenient in lm-eval's tasks with two (strict-match, flexible-extract).
        shown = chosen + (f", {filters[-1]}" if len(filters) > 1 else "")
        if found is None:
            found = Scored(shown, {}, {}, bool(results["higher_is_better"].get(task, {}).get(chosen, True)))
        found.versions[task] = results["versions"].get(task)
        for sample in samples:
            if sample["filter"] == filters[-1]:
                key = (task, sample["doc_id"], sample["doc_hash"])
                question = found.questions.setdefault(key, Question(key, sample["arguments"][0][0]))
                question.scores.append(_number(sample[chosen]))
    return found


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError):
        return None


@contextlib.contextmanager
def _inside(directory: Path | None) -> Iterator[None]:
    """A data set's OWNER/NAME is a path first, and the hub's name only where there is no such path."""
    with contextlib.chdir(directory) if directory else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """lm-eval prints a progress bar of its own for building prompts."""
    import lm_eval.api.task as module

    kept = module.tqdm
    if not verbose:
        module.tqdm = lambda things, **_: things
    try:
        yield
    finally:
        module.tqdm = kept


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]
