"""Static batches: C requests that start together, timed by SGLang's own one-batch module."""

import contextlib
import functools
import math
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from idlm_sglang.bench.decoding import Counts
from idlm_sglang.bench.load import Point, decoded, where
from idlm_sglang.bench.prompts import Request
from idlm_sglang.bench.servers import BenchError, Served, authorization
from idlm_sglang.bench.summary import Ratio, ratio
from idlm_sglang.compat.one_batch import FIGURES, chat_defaults, sampling_of_chat, serve_batch
from idlm_sglang.config import SettingError

# Fields of a chat request that mean the same to /generate, and those that the comparison sets or the prompt is made of.
_CARRIED = {"max_tokens", "min_tokens", "ignore_eos", "stop", "stop_token_ids", "stop_regex", "no_stop_trim", "skip_special_tokens", "temperature", "top_p", "top_k",
            "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "regex", "ebnf", "custom_params", "seed"}  # fmt: skip
_PROMPT = {"messages", "chat_template_kwargs"}
# Settings of a server that change the prompts of chats.
_TEMPLATES = ("chat_template", "hf_chat_template_name", "default_chat_template_kwargs")
_BURST = 3.0  # times the median rate of a repeat, which no decode step reaches: the tokens had waited for the client or the HTTP server
_OFTEN = 0.5  # share of the batches that have to have been full at once, for a figure of full batches


def refuse(requests: Iterable[Request]) -> None:
    """Raise :class:`SettingError` for a request, or fields of one, that a batch of prompts cannot carry."""
    for request in requests:
        unknown = sorted(set(request) - _CARRIED - _PROMPT)
        if unknown:
            raise SettingError(f"--one-batch cannot send the request field {unknown[0]}; allowed: messages, chat_template_kwargs, {', '.join(sorted(_CARRIED))}")
        for message in request.get("messages", []):
            if not isinstance(message, dict) or set(message) != {"role", "content"} or not isinstance(message["content"], str):
                raise SettingError(f"--one-batch cannot send the message {str(message)[:100]!r}; allowed: messages of a role and a text")


def check_template(served: Served) -> None:
    """Raise :class:`BenchError` for a server that makes other prompts of a chat than the checkpoint's tokenizer does."""
    info = served.get("/server_info")
    for name in _TEMPLATES:
        if info.get(name):
            flag = "--" + name.replace("_", "-")
            raise BenchError(f"arm {served.arm.name} has {flag} {str(info[name])[:100]}, and --one-batch sends prompts in the checkpoint's own template; allowed: arms without it")


def measure(served: Served, point: Point, requests: list[Request], tokenizer: str, warm: bool, scratch: Path, log: Path) -> dict[str, Any]:
    """The raw result of as many whole batches of ``point.concurrency`` as ``requests`` make up, one behind the other, ready for JSON.

    Arguments as of :func:`idlm_sglang.bench.load.measure`; ``batches`` holds FIGURES of each batch.

    Raises:
        BenchError: an answer is an error, or most batches end with their last first token.
    """
    size = point.concurrency
    batches = [requests[i : i + size] for i in range(0, len(requests) - size + 1, size)]
    drive = functools.partial(_drive, served, point, tokenizer, chat_defaults(tokenizer, served.get("/server_info")), scratch / "batch.jsonl", log)
    before_load = os.getloadavg()[0]
    if not warm:
        drive(batches[0])
    before, started = Counts(served.metrics()), time.time()
    told, ends = zip(*map(drive, batches))
    found = decoded(served, point, before, size * len(batches))
    if not np.median([one["output_throughput"] for one in told]):
        raise BenchError(f"{where(point)}: in most of {len(batches)} batches no answer went on behind the last first token; allowed: longer answers (--max-tokens)")
    return {
        "started": round(started, 3),
        "load_average": round(before_load, 2),
        "finished": dict(sum(ends, Counter())),
        "decoding": found.as_dict() if found else None,
        "batches": {name: [None if one[name] is None else round(one[name], 5) for one in told] for name in FIGURES},
    }


def _drive(served: Served, point: Point, tokenizer: str, defaults: dict[str, Any], file: Path, log: Path, requests: list[Request]) -> tuple[dict[str, Any], Counter]:
    with log.open("a") as told, contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            loaded = _tokenizer(tokenizer)
            prompts = [_prompt(request, loaded) for request in requests]
            sampling = [sampling_of_chat({key: request[key] for key in request.keys() & (_CARRIED | {"messages"})}, defaults) for request in requests]
            return serve_batch(served.url, loaded, prompts, sampling, file, authorization())
        except Exception as error:
            if isinstance(error, SettingError):
                raise
            reason = (str(error).strip().splitlines() or ["no reason given"])[0][:400]
            raise BenchError(f"{where(point)}: a batch of {len(requests)} failed ({type(error).__name__}: {reason}); SGLang's one-batch module wrote into {log}") from error


@functools.cache
def _tokenizer(checkpoint: str) -> Any:
    from sglang.benchmark.utils import get_tokenizer

    return get_tokenizer(checkpoint)


def _prompt(request: Request, tokenizer: Any) -> str:
    """The text of a chat, as the server's chat endpoint makes it."""
    text = tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, tokenize=False, **request.get("chat_template_kwargs", {}))
    # Some tokenizers put in front what the template has written already.
    twice = tokenizer.bos_token_id is not None and tokenizer.encode(text)[:2] == [tokenizer.bos_token_id] * 2
    return text.removeprefix(tokenizer.bos_token) if twice else text


@dataclass(frozen=True)
class BatchCell:
    """One arm and batch size, all batches of all repeats together.

    Attributes:
        batches: measured, of all repeats.
        bursts: batches of them at more than 3 times the median rate of their repeat. Their first tokens came late, with those behind them,
            because a process had to wait for its core. Their decode time is too short; they are not in ``throughput``.
        throughput: output tokens per second of all requests, from the last first token to the end of the last answer; over the batches of
            a repeat, tokens over time; median of the repeats.
        steady: the same from the last first token to the first end of an answer, median of the batches; NaN where fewer than half of them had such a time.
        full: share of the time of ``throughput`` in which the batch was full.
        last_first: seconds to the last first token of a batch, median over the batches.
        tokens_per_forward: from the server's counters, None where unknown.
        ratio: of ``throughput`` to the reference arm's, None for itself.
    """

    arm: str
    temperature: float
    concurrency: int
    repeats: int
    batches: int
    bursts: int
    throughput: float
    steady: float
    full: float
    last_first: float
    tokens_per_forward: float | None
    ratio: Ratio | None


def cells(results: dict[Point, dict[str, Any]], arms: list[str]) -> list[BatchCell]:
    """Every arm and batch size, in order of temperature, size and arm; the first arm is the reference."""
    found = []
    for temperature, size in sorted({(p.temperature, p.concurrency) for p in results}):
        by_arm = {arm: {p.repeat: r for p, r in results.items() if (p.arm, p.temperature, p.concurrency) == (arm, temperature, size)} for arm in arms}
        found += [_cell(arm, temperature, size, by_arm[arm], None if arm == arms[0] else by_arm[arms[0]]) for arm in arms if by_arm[arm]]
    return found


def throughput(result: dict[str, Any]) -> float:
    """Output tokens behind the last first token per second, of all batches of one point but those in a burst."""
    told = result["batches"]
    rates, seconds = np.asarray(told["output_throughput"]), np.subtract(told["latency"], told["last_ttft"]) * ~_burst(result)
    return float(np.dot(rates, seconds) / seconds.sum())


def _burst(result: dict[str, Any]) -> np.ndarray:
    """Which batches of one point had their tokens behind the last first token at once. Where answers are short that is no rate, and
    the faster the arm the more often: with them in the figure a busy machine would flatter it."""
    rates = np.asarray(result["batches"]["output_throughput"])
    return rates > _BURST * np.median(rates)


def _cell(arm: str, temperature: float, size: int, ours: dict[int, dict], reference: dict[int, dict] | None) -> BatchCell:
    told = {name: np.concatenate([np.asarray(r["batches"][name], float) for r in ours.values()]) for name in FIGURES}
    window, rate = told["steady_state_window_s"], told["steady_state_output_throughput"]
    some = ~np.isnan(window)
    # A median: where the batch was full for a moment only, the rate is that of one burst from the socket.
    steady = float(np.median(rate[some])) if some.mean() >= _OFTEN else math.nan
    tpf = [r["decoding"]["tokens_per_forward"] for r in ours.values() if r["decoding"]]
    shared = sorted(ours.keys() & reference.keys()) if reference else []
    return BatchCell(
        arm,
        temperature,
        size,
        len(ours),
        len(some),
        int(sum(_burst(r).sum() for r in ours.values())),
        float(np.median([throughput(r) for r in ours.values()])),
        steady,
        float(window[some].sum() / (told["latency"] - told["last_ttft"]).sum()),
        float(np.median(told["last_ttft"])),
        float(np.mean(tpf)) if len(tpf) == len(ours) else None,
        ratio([throughput(ours[r]) for r in shared], [throughput(reference[r]) for r in shared]) if shared else None,
    )
