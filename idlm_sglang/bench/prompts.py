"""The requests of a point: chat messages with the sampling and the seed of each, the same for every arm."""

import json
import random
from pathlib import Path

from idlm_sglang.config import SettingError
from idlm_sglang.demo.corpus import held_out_dialogues

Request = dict  # of one request's body

# What a comparison sets itself; in a file of requests these are left out.
OWN = ("model", "temperature", "seed", "n", "stream", "stream_options")


def read(path: Path) -> list[Request]:
    """Chat requests of a JSONL file, one a line: ``{"messages": [...]}`` with any further fields of OpenAI's but those of OWN, or
    ``{"prompt": "..."}`` for a single question. Raises :class:`SettingError`.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"--prompts {path} cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'}); allowed: a JSONL file") from None
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("prompt"), str):
            row = {"messages": [{"role": "user", "content": row["prompt"]}], **{k: v for k, v in row.items() if k != "prompt"}}
        if not isinstance(row, dict) or not row.get("messages"):
            raise SettingError(f'--prompts {path} line {number} is no request; allowed: {{"messages": [...]}} or {{"prompt": "..."}}')
        if "max_completion_tokens" in row:
            row["max_tokens"] = row.pop("max_completion_tokens")
        requests.append({key: value for key, value in row.items() if key not in OWN})
    if not requests:
        raise SettingError(f"--prompts {path} is empty; allowed: at least one request")
    return requests


def built_in(count: int, seed: int) -> list[Request]:
    """Questions that the embedded checkpoint was not trained on. Any chat model can answer them; they are short and easy."""
    return [{"messages": dialogue.question()} for dialogue in held_out_dialogues(seed, count)]


def draw(source: list[Request] | None, count: int, repeat: int, seed: int, body: dict) -> list[Request]:
    """``count`` requests of one repeat, each with ``body`` and a seed of its own; a request's own fields win.

    Another repeat draws other requests. Which they are depends on the arguments alone.
    """
    rng = random.Random(f"{seed}-{repeat}-{count}")
    chosen = built_in(count, rng.randrange(2**31)) if source is None else _some(rng, source, count)
    # Without include_usage the load generator takes the length asked for as the length of the answer.
    return [{**body, "seed": rng.randrange(2**31), **request, "stream_options": {"include_usage": True}} for request in chosen]


def _some(rng: random.Random, source: list[Request], count: int) -> list[Request]:
    """Each as often as the others, or once less."""
    whole, rest = divmod(count, len(source))
    found = source * whole + rng.sample(source, rest)
    rng.shuffle(found)
    return found


def write(requests: list[Request], path: Path) -> None:
    """In the format of the load generator's ``openai`` dataset."""
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
