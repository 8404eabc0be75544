"""One measurement: one arm, one load, timed by SGLang's own load generator."""

import contextlib
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idlm_sglang.bench import prompts
from idlm_sglang.bench.decoding import RETRACTED, Counts, Decoding, decoding
from idlm_sglang.bench.servers import BenchError, Served
from idlm_sglang.compat.client import Streamed, serve_load

# Of the load generator's result: what says more than its arguments.
_KEPT = ("duration", "completed", "total_input_tokens", "total_output_tokens", "total_output_tokens_retokenized", "output_throughput", "mean_itl_ms")
_FINISHED = ("stop", "length", "tool_calls")
_STEADY = 0.9  # share of the peak concurrency above which the load counts as steady


@dataclass(frozen=True)
class Point:
    """What is measured: an arm under ``concurrency`` clients at one temperature, for the ``repeat``-th time."""

    arm: str
    temperature: float
    concurrency: int
    repeat: int


def measure(served: Served, point: Point, requests: list[prompts.Request], tokenizer: str, warm: bool, scratch: Path, log: Path) -> dict[str, Any]:
    """The raw result of one point, ready for JSON.

    ``tokenizer``: the checkpoint, for the load generator. ``warm``: this server has had this load before. ``log``: where the
    load generator's own words go.

    Raises:
        BenchError: an answer is an error, or comes without its number of tokens.
    """
    file = scratch / "requests.jsonl"
    before_load = os.getloadavg()[0]
    if not warm:
        # Requests of their own, so that neither the warm-up's time nor its counts are in the point.
        _drive(served, point, requests[: max(point.concurrency, 4)], tokenizer, file, log)
    before = Counts(served.metrics())
    started = time.time()
    result, outputs, rows, loaded, streamed = _drive(served, point, requests, tokenizer, file, log)
    found = decoded(served, point, before, len(outputs))
    first = min(o.start_time for o in outputs)
    return {
        "started": round(started, 3),
        "load_average": round(before_load, 2),
        "serving": {key: result[key] for key in _KEPT},
        "steady": _steady(outputs, loaded, rows),
        "finished": dict(streamed.finished),
        "decoding": found.as_dict() if found else None,
        "requests": {
            "start": [round(o.start_time - first, 5) for o in outputs],
            "latency": [round(o.latency, 5) for o in outputs],
            "ttft": [round(o.ttft, 5) for o in outputs],
            "prompt_tokens": [o.prompt_len for o in outputs],
            "tokens": [o.output_len for o in outputs],
            "answer": [hashlib.sha256(o.generated_text.encode()).hexdigest()[:8] for o in outputs],
        },
    }


def decoded(served: Served, point: Point, before: Counts, answers: int) -> Decoding | None:
    """What the server did since ``before``, while ``answers`` were given. Raises :class:`BenchError` for requests that were retracted."""
    counts = Counts(served.metrics()).since(before)
    if counts[RETRACTED]:
        raise BenchError(f"{where(point)}: {counts[RETRACTED]:.0f} requests were retracted, the KV pool is too small for this load; raise --max-total-tokens or --mem-fraction-static")
    info = served.get("/server_info")
    stride = (info.get("internal_states") or [{}])[0].get("idlm", {}).get("stride")
    other = info.get("speculative_algorithm") or info.get("dllm_algorithm")
    return decoding(counts, answers, stride, other, info.get("speculative_num_draft_tokens"))


def _drive(served: Served, point: Point, requests: list[prompts.Request], tokenizer: str, file: Path, log: Path):
    prompts.write(requests, file)
    name = served.get("/v1/models")["data"][0]["id"]
    words = ["--backend", "sglang-oai-chat", "--base-url", served.url, "--model", tokenizer, "--tokenizer", tokenizer, "--served-model-name", name]
    words += ["--dataset-name", "openai", "--dataset-path", str(file), "--num-prompts", str(len(requests)), "--max-concurrency", str(point.concurrency)]
    words += ["--warmup-requests", "0", "--flush-cache", "--disable-tqdm", "--output-details", "--output-file", os.devnull]
    with log.open("a") as told, contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            return serve_load(words, lambda outputs, streamed: _check_answers(point, len(requests), outputs, streamed))
        except SystemExit as end:
            # Our own refusals, and the end that a signal asked for.
            if isinstance(end.code, str) or (end.code or 0) > 128:
                raise
            raise BenchError(f"SGLang's load generator gave up on arm {served.arm.name} (exit code {end.code}); its words are in {log}") from None
        except Exception as error:
            raise BenchError(f"SGLang's load generator failed on arm {served.arm.name} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]}); its words are in {log}") from error


def where(point: Point) -> str:
    """A point in words, for an error."""
    return f"arm {point.arm} at concurrency {point.concurrency}, temperature {point.temperature:g}"


def _check_answers(point: Point, asked: int, outputs: list, streamed: Streamed) -> None:
    """Every answer came, ended as an answer ends, and told its length. SGLang sends some errors as an event behind HTTP 200."""
    if len(outputs) != asked:
        raise BenchError(f"{where(point)}: {asked} requests were asked and {len(outputs)} answered")
    failed = [(o.error.strip().splitlines() or ["no reason given"])[-1] for o in outputs if not o.success] + streamed.errors
    if failed:
        raise BenchError(f"{where(point)}: {len(failed)} of {len(outputs)} answers are errors, the first: {failed[0][:300]}")
    unusual = {reason: count for reason, count in streamed.finished.items() if reason not in _FINISHED}
    if unusual or streamed.finished.total() != asked:
        raise BenchError(f"{where(point)}: {asked} answers ended as {dict(streamed.finished)}; allowed: {', '.join(_FINISHED)}")
    if streamed.usages < asked:
        raise BenchError(f"{where(point)}: {streamed.usages} of {asked} streamed answers say how long they are (usage)")


def _steady(outputs: list, tokenizer: Any, rows: list) -> dict[str, float]:
    """Throughput while the load was near its peak, without the first and the last requests' slack."""
    from sglang.benchmark.steady_state import calculate_steady_state_metrics

    found = calculate_steady_state_metrics(outputs, tokenizer, _STEADY, rows)
    return {"seconds": round(found.duration, 4), "output_throughput": found.output_throughput, "concurrency": found.average_concurrency}
