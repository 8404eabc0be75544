"""The requests that both servers get: read from a file, sorted by how their answers can be compared."""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idlm_sglang.config import SettingError
from idlm_sglang.serving.replay import CHAT, GENERATE, PATHS

EXAMPLE = Path(__file__).with_name("example.jsonl")
GREEDY, SEEDED, SAMPLED = "greedy", "seeded", "sampled"
_ALLOWED = '{"messages": [...], ...}, {"prompt": "..."}, "...", or {"path": "/v1/completions", "request": {...}}'
# What a log has beside its requests.
_BESIDE = {"path", "request", "response", "expected"}


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        place: its line in the file, for people.
        body: as sent, but for the model's name, which is each server's own.
        kind: ``greedy``, ``seeded`` or ``sampled``.
        expected: what a right answer contains, or None.
    """

    place: str
    path: str
    body: dict[str, Any]
    kind: str
    expected: str | None = None

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))


def read(file: Path | None, limit: int | None = None) -> list[Ask]:
    """The requests of a file, ``-`` for standard input, None for the bundled one. Raises :class:`SettingError`."""
    shown = EXAMPLE if file is None else file
    try:
        lines = (sys.stdin.read() if str(shown) == "-" else shown.read_text()).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"--prompts {shown} cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'}); allowed: a JSONL file, or -") from None
    found = [_ask(shown, number, line) for number, line in enumerate(lines, 1) if line.strip()][:limit]
    if not found:
        raise SettingError(f"--prompts {shown} is empty; allowed: at least one request")
    return found


def kind_of(path: str, body: dict[str, Any]) -> str:
    """How the answer to a request can be compared, from its sampling parameters; a temperature left open counts as 1."""
    params = body.get("sampling_params") or {} if path == GENERATE else body
    several = params if isinstance(params, list) else [params]
    if all(p.get("temperature") == 0 or p.get("top_k") == 1 for p in several):
        return GREEDY
    seeds = [p.get("sampling_seed") if path == GENERATE else p.get("seed") for p in several]
    return SEEDED if all(seed is not None for seed in seeds) else SAMPLED


def _ask(file: Path, number: int, line: str) -> Ask:
    refused = SettingError(f"--prompts {file} line {number} is no request; allowed: {_ALLOWED}")
    try:
        row = json.loads(line)
    except ValueError:
        raise refused from None
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise refused
    expected = row.pop("expected", None)
    if expected is not None and not isinstance(expected, str):
        raise SettingError(f"--prompts {file} line {number}: expected is no text; allowed: a text that the answer contains")
    if "request" in row:
        path, body = row.get("path"), row["request"]
        if path not in PATHS or not isinstance(body, dict) or set(row) - _BESIDE:
            raise refused
    else:
        path, body = CHAT, row
        if isinstance(body.get("prompt"), str) and "messages" not in body:
            body = {"messages": [{"role": "user", "content": body.pop("prompt")}], **body}
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            raise refused
    params = body.get("sampling_params") if path == GENERATE else None
    if params is not None and not all(isinstance(p, dict) for p in (params if isinstance(params, list) else [params])):
        raise SettingError(f"--prompts {file} line {number}: sampling_params is not valid; allowed: an object, or a list of objects")
    return Ask(f"line {number}", path, body, kind_of(path, body), expected)


def counts(asks: Iterable[Ask]) -> dict[str, int]:
    """How many of each kind."""
    found = {GREEDY: 0, SEEDED: 0, SAMPLED: 0}
    for ask in asks:
        found[ask.kind] += 1
    return found
