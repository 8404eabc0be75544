"""A comparison from its plan to its exit code."""

import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from idlm_sglang.config import SettingError
from idlm_sglang.quality import harness, report, scores
from idlm_sglang.quality.endpoint import Endpoint, EndpointError, Served
from idlm_sglang.quality.options import Plan
from idlm_sglang.quality.statistics import UNDECIDED, WORSE

FINE, FOUND_WORSE, FAILED, OPEN = 0, 1, 2, 3
_PACKAGES = ("idlm-sglang", "lm_eval", "datasets", "openai", "numpy", "scipy")


def run(plan: Plan, words: Sequence[str]) -> int:
    """Ask, compare, report: Markdown to standard output, all else to standard error. Returns the exit code.

    ``words``, the command line, go into the fingerprint. lm-eval must have been prepared (:func:`harness.prepare`).
    """
    try:
        return _run(plan, words)
    except EndpointError as failed:
        print(failed, file=sys.stderr)
        return FAILED


def _run(plan: Plan, words: Sequence[str]) -> int:
    endpoints = {arm.name: Endpoint(arm, plan) for arm in plan.arms}
    served = {name: endpoint.served() for name, endpoint in endpoints.items()}
    _check_context(plan, served)
    tasks = harness.Harness(plan)
    benchmarks = tasks.benchmarks()
    fingerprint = _fingerprint(plan, served, words)
    if plan.out:
        _open(plan, fingerprint)

    from idlm_sglang.quality.client import ChatModel

    logs = {name: plan.out / f"answers-{name}.jsonl" if plan.out else None for name in endpoints}
    models = {name: ChatModel(endpoint, served[name].model, plan, logs[name]) for name, endpoint in endpoints.items()}
    rows: list[scores.Row] = []
    not_run: dict[str, str] = {}
    try:
        for number, benchmark in enumerate(benchmarks, 1):
            try:
                loaded = tasks.load(benchmark)
                found = {}
                for name, model in models.items():
                    model.answers.clear()
                    model.shown = f"{benchmark.name} ({number}/{len(benchmarks)}), {name}"
                    found[name] = tasks.ask(loaded, model, benchmark)
                rows.append(scores.row(benchmark, found, models))
            except harness.NotRun as why:
                not_run[benchmark.name] = str(why)
                print(f"idlm: {benchmark.name}: {why}", file=sys.stderr)
    finally:
        for model in models.values():
            model.close()
    pooled = scores.compare(rows, plan.margin)
    fingerprint["answers"] = {name: {"asked": model.asked, "reused": model.reused} for name, model in models.items()}
    text = report.markdown(plan, fingerprint, rows, pooled, not_run)
    print(text, end="")
    if plan.out:
        report.write(plan.out, text, report.document(plan, fingerprint, rows, pooled, not_run), rows)
    if not rows:
        print("idlm: nothing could be run; the reasons are above", file=sys.stderr)
        return FAILED
    return _code(rows, pooled)


def _code(rows: Sequence[scores.Row], pooled: Sequence[scores.Comparison]) -> int:
    every = [c.verdict.word for row in rows for c in row.comparisons] + [c.verdict.word for c in pooled]
    if WORSE in every:
        return FOUND_WORSE
    deciding = pooled or [c for row in rows for c in row.comparisons]
    return OPEN if any(c.verdict.word == UNDECIDED for c in deciding) else FINE


def _check_context(plan: Plan, served: dict[str, Served]) -> None:
    for arm in plan.arms:
        context, asked = served[arm.name].context, arm.extra.get("max_tokens", plan.sampling.get("max_tokens"))
        if context and asked and asked >= context:
            raise SettingError(f"--max-tokens {asked} leaves no room for a prompt: {arm.name} has a context of {context} tokens; allowed: less than {context}")


def _fingerprint(plan: Plan, served: dict[str, Served], words: Sequence[str]) -> dict[str, Any]:
    hidden = [word if i == 0 or words[i - 1] != "--api-key" else "..." for i, word in enumerate(words)]
    return {
        "what": f"suite {plan.suite}" if plan.suite else ", ".join(plan.tasks),
        "command": "idlm eval " + shlex.join(word if not word.startswith("--api-key=") else "--api-key=..." for word in hidden),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "sampling": plan.sampling,
        "thinking": plan.thinking,
        "seed": plan.seed,
        "repeats": plan.repeats,
        "limit": plan.limit,
        "margin": plan.margin,
        "arms": {
            arm.name: {"url": arm.url, "model": served[arm.name].model, "context": served[arm.name].context, "extra": arm.extra, "info": served[arm.name].info}
            for arm in plan.arms
        },
    }


def _open(plan: Plan, fingerprint: dict[str, Any]) -> None:
    """The directory for the results. One with answers is touched only to go on with the same arms."""
    kept = plan.out / "arms.json"
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        before = json.loads(kept.read_text()) if kept.exists() else None
        if before is not None and not plan.resume:
            raise SettingError(f"--out {plan.out} has the answers of an earlier run; allowed: another directory, or --resume to go on with it")
        arms = json.loads(json.dumps({name: {"model": arm["model"], "info": _lasting(arm["info"])} for name, arm in fingerprint["arms"].items()}))
        for name in arms:
            if before is not None and before.get(name, arms[name]) != arms[name]:
                raise SettingError(f"--resume: {name} is not the server that gave the answers in {plan.out}; allowed: the same one, or another --out")
        kept.write_text(json.dumps((before or {}) | arms, indent=1) + "\n")
    except (OSError, ValueError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(f"--out {plan.out} cannot be used ({error}); allowed: a directory that can be written") from None


def _lasting(info: dict[str, Any]) -> dict[str, Any]:
    """What stays over a restart: SGLang draws its random seed anew."""
    return {key: value for key, value in info.items() if key != "random_seed"}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
