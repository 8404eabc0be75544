"""What `idlm eval` was asked for: its flags, checked, in one frozen dataclass."""

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from idlm_sglang.config import SettingError, whole_number
from idlm_sglang.quality.published import COLUMNS

PAPER, DEMO = "paper", "demo"
SUITES = (PAPER, DEMO)
THINKING = ("on", "off", "model")
# The paper's sampling, and the embedded checkpoint's with the room that it has.
_SAMPLING = {
    PAPER: {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "max_tokens": 32768},
    DEMO: {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "max_tokens": 256},
}
_OWNED = ("messages", "model", "seed", "n", "stream", "stop")

_DESCRIPTION = """\
Ask several endpoints the same benchmark questions through lm-eval and compare the answers question by question.

NAME=URL is an OpenAI-style server; the first is the reference, the others are compared with it. Every arm gets the same
prompts, the same sampling and, question by question, the same seed. What cannot be run is printed with its reason."""

_EPILOG = """\
examples:
  idlm eval ar=http://127.0.0.1:30000 isd=http://127.0.0.1:30001 --suite demo
  idlm eval ar=http://gpu1:30000 isd=http://gpu2:30000 --suite paper --published I-DLM-8B --out results
  idlm eval n1=http://gpu1:30000 n4=http://gpu1:30000 --extra 'n1={"custom_params": {"idlm_stride": 1}}' --tasks gsm8k_cot

exit code: 0 no arm is worse and something was decided, 1 an arm is worse, 2 a mistake in the command, an endpoint that failed or
nothing that could be run, 3 no arm is worse and nothing was decided. What decides is the line `all questions`, and any single
benchmark that says worse."""


@dataclass(frozen=True)
class Arm:
    """One endpoint and what is added to each request to it."""

    name: str
    url: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Everything the run needs.

    Attributes:
        arms: the reference first.
        suite: ``paper``, ``demo`` or None where ``tasks`` names lm-eval's tasks.
        sampling: fields of the request body; those absent come from the task.
        margin: largest difference that still is parity, as a share.
        limit: questions per task, or None for all.
        repeats: answers per question, each with another seed.
    """

    arms: tuple[Arm, ...]
    suite: str | None
    tasks: tuple[str, ...]
    include: tuple[Path, ...]
    data: Path | None
    download: bool
    published: str | None
    limit: int | None
    repeats: int
    seed: int
    clients: int
    sampling: dict[str, Any]
    thinking: str
    think_end: str
    margin: float
    retries: int
    timeout: float
    unsafe_code: bool
    out: Path | None
    resume: bool
    api_key: str | None
    verbose: bool


def parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    made = kind(prog="idlm eval", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=style, allow_abbrev=False)
    option = made.add_argument
    option("arms", metavar="NAME=URL", nargs="*", help="an endpoint; the first is the reference")
    option("--suite", metavar="SUITE", help="paper: the paper's benchmarks; demo: questions that the embedded checkpoint can answer")
    option("--tasks", metavar="TASK,...", help="tasks of lm-eval instead of a suite")
    option("--include-path", metavar="DIR", action="append", default=[], help="further task files (YAML), for --tasks; may be repeated")
    option("--data-dir", metavar="DIR", help="data sets as files: DIR/OWNER/NAME is used in place of the hub's OWNER/NAME")
    option("--download", action="store_true", help="let data sets be downloaded (default: the cache of Hugging Face and files only)")
    option("--published", metavar="COLUMN", help=f"published scores to print beside: {', '.join(COLUMNS)} (default for --suite paper: {COLUMNS[0]})")
    option("--limit", metavar="N", help="only the first N questions of each task")
    option("--repeats", metavar="N", default="1", help="answers per question, each with another seed; scores are their means (default 1)")
    option("--seed", metavar="N", default="0", help="every question's seed follows from it (default 0)")
    option("--clients", metavar="N", default="16", help="requests at a time (default 16)")
    option("--temperature", metavar="T", help="default: 1 for a suite, else what the task says")
    option("--top-p", metavar="P", help="default: 0.95 for a suite, else what the task says")
    option("--top-k", metavar="K", help="default: 50 for a suite, else what the task says")
    option("--max-tokens", metavar="N", help="longest answer, thinking included (default: paper 32768, demo 256, else what the task says, else 2048)")
    option("--thinking", metavar="MODE", help="on, off, or model: what the server does by itself (default: paper on, demo off, else model)")
    option("--think-end", metavar="TEXT", default="</think>", help="what ends the thinking where the server does not split it off (default </think>)")
    option("--extra", metavar="[NAME=]JSON", action="append", default=[], help="fields for the requests to every arm, or to one; may be repeated")
    option("--margin", metavar="POINTS", default="3", help="a difference within +- so many points is parity (default 3)")
    option("--retries", metavar="N", default="3", help="further tries of a request that failed (default 3)")
    option("--timeout", metavar="S", default="3600", help="seconds that one answer may take (default 3600)")
    option("--confirm-run-unsafe-code", action="store_true", help="lm-eval's consent: run the code that models write (HumanEval, MBPP) on this machine")
    option("--out", metavar="DIR", help="report.md, report.json, questions.jsonl and every answer in the form that `idlm replay` reads")
    option("--resume", action="store_true", help="take answers that DIR already has instead of asking again")
    option("--api-key", metavar="KEY", help="sent as a bearer token (default: the variable API_KEY, if set)")
    option("--verbose", action="store_true", help="lm-eval's log to standard error")
    return made


def resolve(given: argparse.Namespace) -> Plan:
    """The plan, or a :class:`SettingError` that names the flag, its value and what is allowed."""
    suite = given.suite
    if suite is not None and suite not in SUITES:
        raise SettingError(f"--suite {suite} is not known; allowed: {', '.join(SUITES)}")
    tasks = tuple(name for name in (given.tasks or "").split(",") if name)
    if (suite is None) == (not tasks):
        raise SettingError("give either --suite or --tasks; allowed: --suite paper, --suite demo, or --tasks with names of lm-eval's tasks")
    column = given.published if given.published is not None else COLUMNS[0] if suite == PAPER else None
    if column is not None and column not in COLUMNS:
        raise SettingError(f"--published {column} is not known; allowed: {', '.join(COLUMNS)}")
    if column is not None and suite != PAPER:
        raise SettingError(f"--published {column} needs --suite paper: published scores belong to its benchmarks")
    thinking = given.thinking or {PAPER: "on", DEMO: "off"}.get(suite, "model")
    if thinking not in THINKING:
        raise SettingError(f"--thinking {thinking} is not known; allowed: {', '.join(THINKING)}")
    if given.resume and not given.out:
        raise SettingError("--resume needs --out DIR, the directory to go on with")
    return Plan(
        arms=_arms(given.arms, given.extra),
        suite=suite,
        tasks=tasks,
        include=tuple(_directory("--include-path", path) for path in given.include_path),
        data=_directory("--data-dir", given.data_dir) if given.data_dir else None,
        download=given.download,
        published=column,
        limit=None if given.limit is None else whole_number(f"--limit {given.limit}", given.limit, 1, None),
        repeats=whole_number(f"--repeats {given.repeats}", given.repeats, 1, 1024),
        seed=whole_number(f"--seed {given.seed}", given.seed, 0, 2**53 - 1),
        clients=whole_number(f"--clients {given.clients}", given.clients, 1, 1024),
        sampling=_sampling(given, suite),
        thinking=thinking,
        think_end=given.think_end,
        margin=_number("--margin", given.margin, 0, 100, "points above 0, up to 100", above=True) / 100,
        retries=whole_number(f"--retries {given.retries}", given.retries, 0, 100),
        timeout=_number("--timeout", given.timeout, 0, 10**6, "seconds above 0", above=True),
        unsafe_code=given.confirm_run_unsafe_code,
        out=Path(given.out).resolve() if given.out else None,
        resume=given.resume,
        api_key=given.api_key or os.environ.get("API_KEY"),
        verbose=given.verbose,
    )


def _arms(words: Sequence[str], extras: Sequence[str]) -> tuple[Arm, ...]:
    allowed = "NAME=URL, such as ar=http://127.0.0.1:30000"
    found: dict[str, str] = {}
    for word in words:
        name, _, url = word.partition("=")
        parts = urlsplit(url)
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingError(f"endpoint {word} is not valid; allowed: {allowed}")
        if name in found:
            raise SettingError(f"endpoint {word}: the name {name} occurs twice; allowed: a name of its own for each endpoint")
        found[name] = url.rstrip("/").removesuffix("/v1")
    if len(found) < 2:
        raise SettingError(f"{len(found)} endpoint{'s' if len(found) != 1 else ''} given; allowed: two or more, each {allowed}")
    added: dict[str, dict] = {name: {} for name in found}
    for word in extras:
        name, _, text = word.partition("=") if not word.lstrip().startswith("{") else ("", "", word)
        if name and name not in found:
            raise SettingError(f"--extra {word} is for no endpoint; allowed: a JSON object, or NAME={{...}} with NAME from {', '.join(found)}")
        try:
            body = json.loads(text)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise SettingError(f"--extra {word} is not valid; allowed: a JSON object of request fields")
        if taken := [key for key in body if key in _OWNED]:
            raise SettingError(f"--extra {word} sets {taken[0]}, which idlm eval sets itself; allowed: fields other than {', '.join(_OWNED)}")
        for each in [name] if name else found:
            added[each] |= body
    return tuple(Arm(name, url, added[name]) for name, url in found.items())


def _sampling(given: argparse.Namespace, suite: str | None) -> dict[str, Any]:
    asked = {
        "temperature": given.temperature and _number("--temperature", given.temperature, 0, 100, "a number from 0 to 100"),
        "top_p": given.top_p and _number("--top-p", given.top_p, 0, 1, "a number above 0, up to 1", above=True),
        "top_k": given.top_k and whole_number(f"--top-k {given.top_k}", given.top_k, -1, None),
        "max_tokens": given.max_tokens and whole_number(f"--max-tokens {given.max_tokens}", given.max_tokens, 1, None),
    }
    return _SAMPLING.get(suite, {}) | {key: value for key, value in asked.items() if value is not None}


def _number(flag: str, text: str, low: float, high: float, allowed: str, above: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (low < value if above else low <= value) or not value <= high:
        raise SettingError(f"{flag} {text} is not valid; allowed: {allowed}")
    return value


def _directory(flag: str, text: str) -> Path:
    path = Path(text).resolve()
    if not path.is_dir():
        raise SettingError(f"{flag} {text} is no directory; allowed: an existing directory")
    return path
