"""`idlm replay`: ask a log of answers again at one token per step, and compare. Speaks HTTP only."""

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from idlm_sglang.config import SettingError
from idlm_sglang.serving.options import integer

GENERATE, CHAT, COMPLETIONS = "/generate", "/v1/chat/completions", "/v1/completions"
PATHS = (GENERATE, CHAT, COMPLETIONS)
STRIDE_PARAM = "idlm_stride"
MAX_CLIENTS = 256
EQUAL, DIFFER, FAILED = 0, 1, 2

_TIMEOUT = 600.0  # seconds for one answer at one token per step
_LOCAL = ("127.0.0.1", "localhost", "::1")
# What must not be sent again, or would change nothing but the work: a request's name, its way of delivery, log-probabilities.
_DROPPED = {"rid", "stream", "stream_options", "logprobs", "top_logprobs", "return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob"}


class Unreachable(Exception):
    """The server does not answer, or not to us."""


@dataclass(frozen=True)
class Answer:
    """What is compared: token ids where they are known, else what the client was shown; and how the answer ended."""

    tokens: list[int] | None
    shown: str
    finish: str | None


@dataclass(frozen=True)
class Ask:
    """One logged answer and the request that should give it again.

    Attributes:
        place: the log's line, and which of its answers.
        obstacle: why it cannot be replayed, or empty.
    """

    place: str
    path: str
    body: dict
    logged: Answer | None
    obstacle: str = ""


def run(file: str, url: str, api_key: str | None, clients: str) -> int:
    """Replay a log, one line per difference and a closing one. Returns the exit code."""
    try:
        width = integer("--clients", clients, 1, MAX_CLIENTS)
        server = Server(url, api_key)
        asks = [ask for number, line in enumerate(_lines(file), 1) if line.strip() for ask in _asks(file, number, line)]
    except SettingError as refused:
        print(refused.code, file=sys.stderr)
        return FAILED
    equal = differing = skipped = 0
    try:
        with ThreadPoolExecutor(width) as pool:
            # Orderly: a log that cannot be replayed ends with the first request, not with a line for each.
            for ask, said in zip(asks, pool.map(lambda ask: None if ask.obstacle else server.compare(ask), asks)):
                skipped += bool(ask.obstacle)
                equal += said == ""
                differing += bool(said)
                if said or ask.obstacle:
                    print(f"{ask.place}: {said or 'not replayable: ' + ask.obstacle}", flush=True)
    except Unreachable as reason:
        print(f"idlm: --url {url} {reason}; allowed: the address of a running server", file=sys.stderr)
        return FAILED
    print(f"idlm: {equal + differing} of {len(asks)} answers replayed at one token per step: {equal} equal, {differing} different; {skipped} not replayable")
    return FAILED if equal + differing == 0 else DIFFER if differing else EQUAL


def _lines(file: str) -> Iterable[str]:
    try:
        return sys.stdin.read().splitlines() if file == "-" else Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise SettingError(f"{file} cannot be read ({reason}); allowed: a JSONL log of answers, or - for stdin") from None


def _asks(file: str, number: int, line: str) -> Iterator[Ask]:
    place = f"line {number}"
    allowed = '{"path": ' + " | ".join(f'"{p}"' for p in PATHS) + ', "request": {...}, "response": {...}}'
    try:
        entry = json.loads(line)
        path, request, response = entry["path"], entry["request"], entry["response"]
        if path not in PATHS or not isinstance(request, dict) or not isinstance(response, (dict, list)):
            raise ValueError
        yield from (_generate if path == GENERATE else _openai)(place, path, request, response)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise SettingError(f"{file} {place} is not a logged answer; allowed: {allowed}") from None


def _generate(place: str, path: str, request: dict, response: dict | list) -> Iterator[Ask]:
    """The answers of ``/generate``: one, or a list for several prompts and ``n`` choices of each, prompt by prompt."""
    answers = response if isinstance(response, list) else [response]
    prompt = request.get("text") if request.get("text") is not None else request.get("input_ids")
    batch = len(prompt) if isinstance(prompt, list) and not all(isinstance(p, int) for p in prompt) else None
    per_prompt = max(len(answers) // (batch or 1), 1)
    for i, answer in enumerate(answers):
        body = {k: v for k, v in request.items() if k not in _DROPPED}
        if batch is not None:
            # In a batch a list has one value per prompt.
            body = {k: v[i // per_prompt] if isinstance(v, list) and len(v) == batch else v for k, v in body.items()}
        params = dict(body.get("sampling_params") or {})
        params |= {"n": 1, "custom_params": {**(params.get("custom_params") or {}), STRIDE_PARAM: 1}}
        meta = answer.get("meta_info") or {}
        obstacle = _obstacle(params, params.get("sampling_seed"), meta) or ("its session has moved on" if request.get("session_params") else "")
        if (seed := _seed(params.get("sampling_seed"), meta)) is not None:
            params["sampling_seed"] = seed
        logged = _answer_of_generate(answer)
        yield _ask(place, i, len(answers), path, body | {"sampling_params": params}, logged, obstacle)


def _openai(place: str, path: str, request: dict, response: dict) -> Iterator[Ask]:
    """The choices of an OpenAI answer; completions of several prompts have ``n`` choices of each, prompt by prompt."""
    choices = sorted(response["choices"], key=lambda choice: choice.get("index", 0))
    prompt = request.get("prompt")
    several = path == COMPLETIONS and isinstance(prompt, list) and not all(isinstance(p, int) for p in prompt)
    for i, choice in enumerate(choices):
        body = {k: v for k, v in request.items() if k not in _DROPPED}
        if several:
            body["prompt"] = prompt[i // max(len(choices) // len(prompt), 1)]
        body |= {"n": 1, "custom_params": {**(body.get("custom_params") or {}), STRIDE_PARAM: 1}}
        meta = choice.get("meta_info") or {}
        obstacle = _obstacle(body, request.get("seed"), meta)
        if (seed := _seed(request.get("seed"), meta)) is not None:
            body["seed"] = seed
        logged = _answer_of_openai(path, response, choice, i)
        if logged.tokens is not None:
            body["return_output_ids_in_sglext" if path == CHAT else "return_token_ids"] = True
        yield _ask(place, i, len(choices), path, body, logged, obstacle)


def _ask(place: str, i: int, count: int, path: str, body: dict, logged: Answer, obstacle: str) -> Ask:
    if logged.finish in (None, "abort"):
        obstacle = "it was aborted" if logged.finish else "it is not finished"
    return Ask(place if count == 1 else f"{place} answer {i + 1}", path, body, logged, obstacle)


def _seed(asked: Any, meta: dict) -> int | None:
    return meta.get("seed") if asked is None else asked


def _obstacle(params: dict, asked: Any, meta: dict) -> str:
    greedy = params.get("temperature") == 0 or params.get("top_k") == 1
    return "" if greedy or _seed(asked, meta) is not None else "sampled, and neither the request nor the answer has a seed"


def _answer_of_generate(answer: dict) -> Answer:
    finish = answer["meta_info"].get("finish_reason")
    return Answer(answer.get("output_ids"), answer.get("text") or "", finish and finish["type"])


def _answer_of_openai(path: str, response: dict, choice: dict, i: int) -> Answer:
    tokens = choice.get("token_ids") or choice.get("response_token_ids")
    if tokens is None:
        tokens = ((response.get("sglext") or {}).get("output_ids") or [])[i : i + 1]
        tokens = tokens[0] if tokens else None
    if path == COMPLETIONS:
        return Answer(tokens, choice["text"], choice.get("finish_reason"))
    message = choice["message"]
    # The ids of tool calls are drawn anew for every answer.
    calls = [{k: v for k, v in call.items() if k != "id"} for call in message.get("tool_calls") or []]
    parts = [message.get("reasoning_content") or "", message.get("content") or "", json.dumps(calls, sort_keys=True) if calls else ""]
    return Answer(tokens, "\n".join(part for part in parts if part), choice.get("finish_reason"))


def difference(logged: Answer, now: Answer) -> str:
    """Where two answers part first, in words; empty where they do not."""
    if logged.tokens is not None and now.tokens is not None:
        what, old, new = "token", logged.tokens, now.tokens
    else:
        what, old, new = "character", logged.shown, now.shown
    if old != new:
        at = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
        was, became = (repr(part[at]) if at < len(part) else "the end" for part in (old, new))
        return f"{what} {at} differs: {was} in the log, {became} now ({len(old)} and {len(new)} {what}s)"
    if logged.finish != now.finish:
        return f"finish reason differs: {logged.finish} in the log, {now.finish} now"
    return ""


class Server:
    """Where the requests go."""

    def __init__(self, url: str, api_key: str | None):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingError(f"--url {url} is not valid; allowed: http://HOST:PORT or https://HOST:PORT")
        self._base = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        # A proxy from the environment has no business between two processes of one machine.
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if parts.hostname in _LOCAL else []))

    def compare(self, ask: Ask) -> str:
        """The difference between the logged answer and the server's, in words; empty where there is none.

        Raises:
            Unreachable: there is no answer to compare.
        """
        request = urllib.request.Request(self._base + ask.path, json.dumps(ask.body).encode(), self._headers)
        try:
            with self._opener.open(request, timeout=_TIMEOUT) as reply:
                response = json.load(reply)
            if ask.path == GENERATE:
                return difference(ask.logged, _answer_of_generate(response))
            return difference(ask.logged, _answer_of_openai(ask.path, response, response["choices"][0], 0))
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise Unreachable(f"refuses the API key (HTTP {error.code})") from None
            text = " ".join(error.read().decode(errors="replace").split())
            return f"the server refuses the request: HTTP {error.code} {text[:200]}"
        except (OSError, urllib.error.URLError) as error:
            raise Unreachable(f"does not answer ({getattr(error, 'reason', error)})") from None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise Unreachable("does not answer as SGLang does") from None
