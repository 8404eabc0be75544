"""SGLang's one-batch module, as `idlm bench` uses it: in this process, against a server that runs, each request with its own sampling."""

import inspect
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import requests

from idlm_sglang.config import SettingError

FIGURES = ("latency", "last_ttft", "input_len", "total_output_tokens", "output_throughput", "steady_state_output_throughput", "steady_state_window_s")
_GENERATE = "/generate"
_STOPS = ("stop", "stop_token_ids", "stop_regex", "regex", "ebnf", "json_schema")
_CHAT_DEFAULTS = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")


class _Http:
    """The module ``requests`` for the one-batch module: with a key, with what ``complete`` makes of a batch, and with the server's words in an error."""

    def __init__(self, headers: Mapping[str, str], complete: Callable[[dict], dict]):
        self._headers, self._complete = headers, complete
        self.batches = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(requests, name)

    def get(self, url: str, **named: Any) -> requests.Response:
        return requests.get(url, headers=self._headers, **named)

    def post(self, url: str, **named: Any) -> requests.Response:
        if url.endswith(_GENERATE):
            named["json"] = self._complete(named["json"])
            self.batches += 1
        reply = requests.post(url, headers=self._headers, **named)
        if not reply.ok:
            raise requests.HTTPError(f"{url} answered {reply.status_code}: {' '.join(reply.text.split())[:300]}", response=reply)
        return reply


def serve_batch(url: str, tokenizer: Any, prompts: Sequence[str], sampling: Sequence[dict], file: Path, headers: Mapping[str, str]) -> tuple[dict[str, Any], Counter]:
    """One batch of ``sglang.benchmark.one_batch_server``: FIGURES of its result (seconds, tokens, tokens per second), and the answers by finish reason.

    ``prompts``: whole texts, chat template included. ``sampling``: SGLang's sampling parameters of each. ``file``: where its data set is written.

    What: ``requests`` and ``validate_finish_reason`` are wrapped in that module for the run.
    Why: its ``run_one_case`` has one temperature for all requests and knows no seed, top_p or key, shuffles its data set, keeps nothing of
    what a server says of an error, and does not look whether all answers came to their end.
    Guard: its parameters and its result's fields; the batch that it is about to send has to hold the prompts it was given; one batch in one call.
    Goes when: it takes the sampling parameters of each request, in the order of the data set, and a key.

    Raises:
        SettingError: SGLang's module is another than this was written for.
        RuntimeError, requests.RequestException: an answer is an error, or has no end.
    """
    from sglang.benchmark import one_batch_server as module

    # Of the conversation's second turn only the length matters, which has to be 2 tokens or more.
    file.write_text("".join(json.dumps({"conversations": [{"content": text}] * 2}) + "\n" for text in prompts))
    call = {
        **{"url": url, "batch_size": len(prompts), "input_len": 0, "output_len": max(own["max_new_tokens"] or 0 for own in sampling)},
        **{"temperature": sampling[0]["temperature"], "ignore_eos": all(map(_to_its_length, sampling)), "return_logprob": False},
        **{"stream_interval": 1, "input_len_step_percentage": 0.0, "run_name": "", "result_filename": "", "tokenizer": tokenizer},
        **{"dataset_name": "custom", "dataset_path": str(file)},
    }
    _guard(module, call)
    ids = [tokenizer.encode(text) for text in prompts]

    def complete(payload: dict[str, Any]) -> dict[str, Any]:
        if sorted(payload.get("input_ids", [])) != sorted(ids) or not isinstance(payload.get("sampling_params"), dict):
            raise SettingError("sglang.benchmark.one_batch_server.run_one_case sends other prompts than it was given; allowed: those of its data set")
        return {**payload, "input_ids": ids, "sampling_params": [{**payload["sampling_params"], **own} for own in sampling]}

    http, ends, validate = _Http(headers, complete), Counter(), module.validate_finish_reason

    def ended(reason: dict[str, Any], **named: Any) -> None:
        validate(reason, **named)
        ends[reason["type"]] += 1

    module.requests, module.validate_finish_reason = http, ended
    try:
        result = module.run_one_case(**call)
    finally:
        module.requests, module.validate_finish_reason = requests, validate
    if http.batches != 1:
        raise SettingError(f"sglang.benchmark.one_batch_server.run_one_case sent {http.batches} batches; allowed: 1")
    if ends.total() != len(prompts):
        raise RuntimeError(f"{ends.total()} of {len(prompts)} answers came to their end")
    return {name: getattr(result, name) for name in FIGURES}, ends


def _to_its_length(sampling: dict[str, Any]) -> bool:
    """The module takes any other end than the longest length for an error then."""
    return sampling["ignore_eos"] and not any(sampling.get(name) for name in _STOPS)


def _guard(module: Any, call: dict[str, Any]) -> None:
    try:
        inspect.signature(module.run_one_case).bind(**call)
    except TypeError as error:
        raise SettingError(f"sglang.benchmark.one_batch_server.run_one_case takes other parameters ({error}); allowed: {', '.join(call)}") from None
    missing = set(FIGURES) - set(module.BenchOneCaseResult.model_fields)
    if missing:
        raise SettingError(f"sglang.benchmark.one_batch_server.BenchOneCaseResult lacks {', '.join(sorted(missing))}; allowed: a result with it")


def sampling_of_chat(request: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """SGLang's sampling parameters of a chat request, by its own conversion. ``defaults``: :func:`chat_defaults`. Raises ValueError."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    read = ChatCompletionRequest(model="", **request)
    return read.to_sampling_params(stop=read.stop, model_generation_config=defaults)


def chat_defaults(checkpoint: str, server_info: dict[str, Any]) -> dict[str, Any]:
    """What the chat endpoint takes from a checkpoint's generation_config.json where a request names nothing. ``/generate`` takes nothing from there."""
    from sglang.srt.utils.hf_transformers_utils import get_generation_config

    if server_info.get("sampling_defaults") != "model":
        return {}
    found = get_generation_config(checkpoint, trust_remote_code=True)
    known = found.to_dict() if found else {}
    return {name: known[name] for name in _CHAT_DEFAULTS if known.get(name) is not None}
