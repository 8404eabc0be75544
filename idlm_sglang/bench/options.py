"""The words of `idlm bench`, checked before anything starts."""

import argparse
import json
import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idlm_sglang.bench.arms import URL, Arm, parse_all, refuse_own
from idlm_sglang.config import SettingError, whole_number
from idlm_sglang.demo import CHECKPOINT_DIR

_ARMS = ("stock", "isd:1", "isd:4", "isd:auto")
_CONCURRENCIES, _QUICK_CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64), (1, 8, 64)
_TEMPERATURES = (0.0, 1.0)
_REPEATS, _MIN_REPEATS = 3, 1
_REQUESTS, _QUICK_REQUESTS = 48, 24
_PER_CLIENT, _QUICK_PER_CLIENT = 6, 3
_START_SECONDS = 600

_DESCRIPTION = """\
Compare servers of one checkpoint under load: AR and ISD, or any SGLang algorithms. Starts the arms (or is given their
URLs), sends each the same requests at each concurrency, in turn, with SGLang's own load generator, and writes raw results
(JSONL), a table (Markdown) and plots (PNG). The first arm is the one that the others are compared with.

MODEL is a directory or a repository's owner/name; without it the embedded demo checkpoint is measured.

An arm is [NAME=]BASE [SGLang flags], BASE one of
  stock        SGLang without the plugin, one token per forward
  ar           the same with the plugin loaded (idlm serve --ar)
  isd, isd:N   ISD, the server choosing its stride step by step (isd:auto is the same), or at stride N
  http://...   a server that runs already; it should have a device of its own and no other clients. Its prefix cache is emptied
               before each measurement

On a CPU all arms stay up and take turns load by load. On a GPU, whose memory holds one of them, each is started alone for every
repeat; --together and --alone say otherwise."""

_EPILOG = """\
examples:
  idlm bench --quick                                          the embedded checkpoint, a few minutes on two cores
  idlm bench /models/I-DLM-8B --arm stock --arm isd:auto --prompts math500.jsonl --max-tokens 2048 \\
             --sampling '{"top_p": 0.95, "top_k": 50}'        against AR, with the sampling of the paper
  idlm bench --arm stock --arm "ngram=stock --speculative-algorithm NGRAM --speculative-num-draft-tokens 8" --arm isd:4
  idlm bench --arm a=http://10.0.0.1:30000 --arm b=http://10.0.0.2:30000 --tokenizer /models/I-DLM-8B

The same command with the same --out goes on where an earlier run stopped, also with more repeats, loads or temperatures.
exit code: 0 measured, 1 an arm failed, answered with errors or admits too few requests, 2 words that are not understood."""


@dataclass(frozen=True)
class Options:
    """What `idlm bench` was asked for. ``body`` holds the request fields of every point, ``sampling`` those added at T > 0;
    ``alone`` is None where the device decides."""

    model: str
    embedded: bool
    arms: tuple[Arm, ...]
    concurrencies: tuple[int, ...]
    temperatures: tuple[float, ...]
    repeats: int
    requests: int
    per_client: int
    prompts: Path | None
    body: dict[str, Any]
    sampling: dict[str, Any]
    seed: int
    server_flags: tuple[str, ...]
    tokenizer: str
    start_seconds: float
    alone: bool | None
    api_key: str | None
    out: Path
    command: str
    one_batch: bool = False

    def count(self, concurrency: int) -> int:
        """Requests of a point."""
        return max(self.requests, self.per_client * concurrency)


def parser(cls: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    found = cls(prog="idlm bench", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    option = found.add_argument
    option("model", nargs="?", metavar="MODEL", help="the checkpoint (default: the embedded one)")
    option("--arm", action="append", metavar="ARM", help=f"an arm, see above (default: {', '.join(_ARMS)})")
    option("--quick", action="store_true", help="fewer and smaller points: C = 1, 8, 64")
    option("--concurrency", nargs="+", metavar="C", help="concurrent requests (default 1 2 4 8 16 32 64)")
    option("--temperature", nargs="+", metavar="T", help="temperatures (default 0 1)")
    option("--repeats", metavar="N", help=f"measurements of each point, each with other requests (default {_REPEATS})")
    option("--requests", metavar="N", help=f"requests of a point, at least (default {_REQUESTS})")
    option("--per-client", metavar="N", help=f"requests of a point per concurrent one, at least (default {_PER_CLIENT})")
    option("--prompts", metavar="FILE", type=Path, help="JSONL of chat requests or prompts (default: built-in short questions)")
    option("--max-tokens", metavar="N", default="160", help="longest answer in tokens, where a request names none (default 160)")
    option("--sampling", metavar="JSON", default="{}", help="request fields added at T > 0, such as top_p and top_k")
    option("--ignore-eos", action="store_true", help="all answers of --max-tokens (default: answers end where the model ends them)")
    option("--seed", metavar="N", default="1", help="of the requests drawn and of their sampling (default 1)")
    option("--server-flags", metavar="FLAGS", default="", help="SGLang flags for every arm that is started, in one word")
    option("--one-batch", action="store_true", help="also time static batches of C requests that start together (SGLang's one-batch module)")
    option("--together", action="store_true", help="all arms stay up (give each its --mem-fraction-static or --base-gpu-id)")
    option("--alone", action="store_true", help="one arm at a time is up, for a whole repeat")
    option("--api-key", metavar="KEY", help="sent as a bearer token (default: the variable API_KEY, if set)")
    option("--tokenizer", metavar="PATH", help="the checkpoint's directory, where MODEL is not it")
    option("--start-seconds", metavar="S", default=str(_START_SECONDS), help=f"time for an arm to start (default {_START_SECONDS})")
    option("--out", metavar="DIR", type=Path, help="where results go (default: a new idlm-bench-... here)")
    return found


def resolve(own: argparse.Namespace, words: Sequence[str]) -> Options:
    """Raises :class:`SettingError`: one line that names the setting, its value and what is allowed."""
    model = own.model or str(CHECKPOINT_DIR)
    if own.model and not Path(model).is_dir() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise SettingError(f"MODEL {model} does not exist; allowed: a checkpoint's directory or a repository's owner/name")
    arms = parse_all(own.arm or list(_ARMS))
    started = [arm for arm in arms if arm.kind != URL]
    embedded = bool(started) and Path(model).is_dir() and Path(model).resolve() == CHECKPOINT_DIR
    if not started and own.model is None and own.tokenizer is None:
        raise SettingError("all arms run already, and nothing says whose prompts to count; allowed: with --tokenizer, the checkpoint's directory")
    tokenizer = own.tokenizer or model
    if own.tokenizer and not (Path(tokenizer) / "tokenizer_config.json").is_file():
        raise SettingError(f"--tokenizer {tokenizer} holds no tokenizer_config.json; allowed: a checkpoint's directory")
    temperatures = tuple(_temperature(text) for text in own.temperature) if own.temperature else _TEMPERATURES
    concurrencies = tuple(_number("--concurrency", text, 1) for text in own.concurrency) if own.concurrency else (_QUICK_CONCURRENCIES if own.quick else _CONCURRENCIES)
    for flag, values in (("--temperature", temperatures), ("--concurrency", concurrencies)):
        if len(set(values)) < len(values):
            raise SettingError(f"{flag} {' '.join(format(v, 'g') for v in values)} names one twice; allowed: different values")
    body = {"max_tokens": _number("--max-tokens", own.max_tokens, 1), "ignore_eos": own.ignore_eos}
    sampling = _object("--sampling", own.sampling)
    for taken in ("temperature", "seed", "stream_options", "messages", "model", *body):
        if taken in sampling:
            raise SettingError(f"--sampling names {taken}, which is set here; allowed: other fields of a chat request")
    if own.one_batch and body["max_tokens"] < 2:
        raise SettingError(f"--max-tokens {own.max_tokens} leaves nothing behind the first token for --one-batch; allowed: 2 or more")
    if own.together and own.alone:
        raise SettingError("--together and --alone were both given; allowed: one of them")
    try:
        flags = tuple(shlex.split(own.server_flags))
    except ValueError as error:
        raise SettingError(f"--server-flags {own.server_flags!r} is not valid ({error}); allowed: flags of SGLang") from None
    refuse_own(f"--server-flags {own.server_flags!r}", list(flags))
    if flags and not started:
        raise SettingError(f"--server-flags {own.server_flags!r} reaches no arm, all run already; allowed: without it")
    out = own.out or Path(f"idlm-bench-{time.strftime('%Y%m%d-%H%M%S')}")
    return Options(
        model=model,
        embedded=embedded,
        arms=tuple(arms),
        concurrencies=tuple(sorted(concurrencies)),
        temperatures=tuple(sorted(temperatures)),
        repeats=_number("--repeats", own.repeats or str(_REPEATS), _MIN_REPEATS),
        requests=_number("--requests", own.requests or str(_QUICK_REQUESTS if own.quick else _REQUESTS), 1),
        per_client=_number("--per-client", own.per_client or str(_QUICK_PER_CLIENT if own.quick else _PER_CLIENT), 1),
        prompts=own.prompts,
        body=body,
        sampling=sampling,
        seed=_number("--seed", own.seed, 0),
        server_flags=flags,
        tokenizer=tokenizer,
        start_seconds=float(_number("--start-seconds", own.start_seconds, 1)),
        alone=True if own.alone else False if own.together or not started else None,
        api_key=own.api_key or os.environ.get("API_KEY"),
        out=out,
        command=shlex.join(masked(["idlm", "bench", *words])),
        one_batch=own.one_batch,
    )


def masked(words: list[str] | None) -> list[str] | None:
    """A command without its keys; None for None."""
    if words is None:
        return None
    return ["***" if before.endswith("api-key") else re.sub(r"(api-key[= ])\S+", r"\1***", word) for before, word in zip(["", *words], words)]


def _number(flag: str, text: str, low: int) -> int:
    return whole_number(f"{flag} {text}", text, low, None)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise SettingError(f"--temperature {text} is not valid; allowed: 0 to 2")
    return value


def _object(flag: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise SettingError(f'{flag} {text!r} is not valid; allowed: a JSON object, such as {{"top_p": 0.95}}')
    return value
