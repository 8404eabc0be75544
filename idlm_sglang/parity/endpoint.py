"""One of the two servers: what it says of itself, and timed answers from it, streams put together."""

import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import ValidationError

from idlm_sglang.parity.compare import Answer, join, parsed
from idlm_sglang.parity.options import Plan
from idlm_sglang.parity.prompts import Ask
from idlm_sglang.quality.endpoint import Endpoint, EndpointError, Served
from idlm_sglang.quality.options import Arm
from idlm_sglang.serving.replay import CHAT, COMPLETIONS, GENERATE

BASELINE, CANDIDATE = "baseline", "candidate"
_LOCAL = ("127.0.0.1", "localhost", "::1")
_CONNECT_SECONDS = 30.0
_OPENAI_TYPES = {(CHAT, False): ChatCompletion, (CHAT, True): ChatCompletionChunk, (COMPLETIONS, False): Completion, (COMPLETIONS, True): Completion}


@dataclass(frozen=True)
class Connection:
    """What :class:`idlm_sglang.quality.endpoint.Endpoint` asks of a plan."""

    clients: int
    timeout: float
    api_key: str | None
    retries: int = 0


@dataclass
class Reply:
    """An answer and when its parts came.

    Attributes:
        answer: status and tree; the model's name is left out of the tree, it may differ.
        invalid: what the types of the `openai` package say against it; empty where they accept it.
        started, ended: seconds of the monotonic clock.
        arrivals: of a stream, when each event with text in it came.
    """

    answer: Answer
    invalid: str = ""
    started: float = 0.0
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)


class Side:
    """The connection to one server."""

    def __init__(self, name: str, url: str, key: str | None, plan: Plan):
        self.name, self.url = name, url
        # A proxy from the environment has no business between two processes of one machine.
        trust = urlsplit(url).hostname not in _LOCAL
        limits = httpx.Limits(max_connections=plan.concurrency + 2, max_keepalive_connections=plan.concurrency + 2)
        self._http = httpx.Client(trust_env=trust, limits=limits, timeout=httpx.Timeout(plan.timeout, connect=_CONNECT_SECONDS))
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._endpoint = Endpoint(Arm(name, url), Connection(plan.concurrency, plan.timeout, key))
        self.served: Served | None = None

    def prepare(self) -> Served:
        """Its model and settings, and a first answer through the `openai` client. Raises :class:`EndpointError`."""
        self.served = self._endpoint.served()
        self._endpoint.chat({"model": self.served.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0})
        return self.served

    def internal_state(self) -> dict[str, Any]:
        """SGLang's ``internal_states[0]`` of ``/server_info``; empty for another server."""
        try:
            return (self._http.get(self.url + "/server_info", headers=self._headers).json().get("internal_states") or [{}])[0]
        except (httpx.HTTPError, ValueError, AttributeError, IndexError):
            return {}

    def ask(self, ask: Ask, body: dict[str, Any] | None = None) -> Reply:
        """The answer to a request of the file, or to another ``body`` on its path. Raises :class:`EndpointError`."""
        body = dict(ask.body if body is None else body)
        if ask.path != GENERATE:
            body["model"] = self.served.model
        return self.post(ask.path, body)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Reply:
        """As it comes, errors included. Raises :class:`EndpointError` where nothing comes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **(self._headers if headers is None else headers)}
        began = time.monotonic()
        try:
            with self._http.stream("POST", self.url + path, content=content, headers=headers) as reply:
                if reply.status_code == 200 and reply.headers.get("content-type", "").startswith("text/event-stream"):
                    return self._stream(path, reply, began)
                text = reply.read().decode(errors="replace")
        except httpx.TimeoutException:
            raise self.failed("did not answer within --timeout") from None
        except httpx.HTTPError as error:
            raise self.failed(f"does not answer ({error or type(error).__name__})") from None
        ended = time.monotonic()
        tree = parsed(text)
        invalid = _invalid(path, False, [tree]) if reply.status_code == 200 else ""
        return Reply(Answer(reply.status_code, _nameless(tree)), invalid, began, ended)

    def _stream(self, path: str, reply: httpx.Response, began: float) -> Reply:
        chunks, arrivals = [], []
        for line in reply.iter_lines():
            if line.startswith("data: "):
                chunk = parsed(line[6:])
                if _says_something(path, chunk):
                    arrivals.append(time.monotonic())
                chunks.append(chunk)
        ended = time.monotonic()
        invalid = _invalid(path, True, [c for c in chunks if isinstance(c, dict) and "error" not in c])
        try:
            tree = join(path, chunks)
        except (AssertionError, KeyError, IndexError, TypeError, AttributeError) as error:
            tree = {"broken stream": f"{type(error).__name__}: {error}"}
        return Reply(Answer(reply.status_code, _nameless(tree)), invalid, began, ended, arrivals)

    def failed(self, what: str) -> EndpointError:
        return self._endpoint.failed(what)


def _says_something(path: str, chunk: Any) -> bool:
    if not isinstance(chunk, dict):
        return False
    if path == GENERATE:
        return bool(chunk.get("text") or chunk.get("output_ids"))
    for choice in chunk.get("choices") or []:
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"):
            return True
    return False


def _invalid(path: str, streamed: bool, trees: list[Any]) -> str:
    kind = _OPENAI_TYPES.get((path, streamed))
    for tree in trees if kind else ():
        try:
            kind.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return ""


def _nameless(tree: Any) -> Any:
    return {key: value for key, value in tree.items() if key != "model"} if isinstance(tree, dict) else tree


def texts(path: str, tree: Any) -> list[str]:
    """What a client is shown of each choice: reasoning, text and the arguments of calls, one behind the other."""
    if not isinstance(tree, (dict, list)):
        return []
    if path == GENERATE:
        answers = tree if isinstance(tree, list) else tree["chunks"] if "chunks" in tree else [tree]
        return [str(answer.get("text", "")) for answer in answers if isinstance(answer, dict)]
    choices = tree.get("choices") if isinstance(tree, dict) else None
    ordered = [choices[i] for i in sorted(choices)] if isinstance(choices, dict) else sorted(choices or [], key=lambda c: c.get("index", 0))
    found = []
    for choice in ordered:
        said = choice.get("message") or choice.get("delta") or {}
        calls = [f"{c['function'].get('name')}({c['function'].get('arguments')})" for c in said.get("tool_calls") or []]
        found.append("".join(filter(None, [said.get("reasoning_content"), said.get("content"), choice.get("text"), *calls])))
    return found


def failed(path: str, answer: Answer) -> bool:
    """It is an error: by its status, inside a stream behind HTTP 200, or as an answer that the server gave up."""
    tree = answer.tree
    if answer.status != 200 or not isinstance(tree, (dict, list)) or not texts(path, tree):
        return True
    if isinstance(tree, dict) and ("error" in tree or "broken stream" in tree or any(isinstance(other, dict) for other in tree.get("others", ()))):
        return True
    if path == GENERATE:
        parts = tree if isinstance(tree, list) else tree.get("chunks", [tree])
        ends = [((part.get("meta_info") or {}).get("finish_reason") or {}) for part in parts if isinstance(part, dict)]
        return any(end.get("type") == "abort" for end in ends if isinstance(end, dict))
    choices = tree.get("choices") or []
    return any(choice.get("finish_reason") == "abort" for choice in (choices.values() if isinstance(choices, dict) else choices))


def completion_tokens(path: str, tree: Any) -> int | None:
    """How long an answer is, as its server counts; None where it does not say."""
    try:
        if path == GENERATE:
            answers = tree if isinstance(tree, list) else tree.get("chunks", [tree])
            return sum(answer["meta_info"]["completion_tokens"] for answer in answers)
        return tree["usage"]["completion_tokens"]
    except (KeyError, TypeError, AttributeError):
        return None


def chosen(path: str, tree: Any) -> list[list[tuple[str, dict[str, float]]]]:
    """For each choice its tokens, each with the candidates and their log-probabilities there; empty where none were given."""
    try:
        if path == GENERATE:
            metas = [answer["meta_info"] for answer in (tree if isinstance(tree, list) else [tree])]
            return [
                [(str(t[1]), {str(c[1]): c[0] for c in top or []}) for t, top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"])]
                for meta in metas
            ]
        if path == COMPLETIONS:
            parts = [choice["logprobs"] for choice in tree["choices"]]
            return [[(token, dict(top or {})) for token, top in zip(p["tokens"], p["top_logprobs"])] for p in parts]
        return [
            [(e["token"], {c["token"]: c["logprob"] for c in e["top_logprobs"]}) for e in choice["logprobs"]["content"]] for choice in tree["choices"]
        ]
    except (KeyError, TypeError, IndexError):
        return []
