"""What a hostile or broken client may send. Each entry is harmless to a server that reads before it trusts."""

import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import requests

from tests.server.parity.cases import CHAT, COMPLETIONS, GENERATE, MESSAGES, RESPONSES, token
from tests.soak.served import Served

SECONDS = 60.0
HELLO = [{"role": "user", "content": "Hello"}]
DEEP = 2_000
TOO_LATE, CLOSED = "no answer in time", "connection closed"


@dataclass(frozen=True)
class Blow:
    """One hostile request. ``send`` gives the HTTP status, ``TOO_LATE`` or ``CLOSED``."""

    name: str
    send: Callable[[Served], Any]


def post(path: str, body: Any, seconds: float = SECONDS) -> Callable[[Served], Any]:
    """``body``: an object, or bytes as they are."""

    def send(server: Served) -> Any:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            headers = {**server.headers, "Content-Type": "application/json"}
            return requests.post(server.url + path, data=content, headers=headers, timeout=seconds).status_code
        except requests.Timeout:
            return TOO_LATE
        except requests.RequestException:
            return CLOSED

    return send


def raw(*pieces: bytes) -> Callable[[Served], Any]:
    """Bytes on the wire; then the client is gone."""

    def send(server: Served) -> Any:
        try:
            with socket.create_connection(("127.0.0.1", server.port), timeout=5) as wire:
                for piece in pieces:
                    wire.sendall(piece)
                wire.settimeout(3)
                return (wire.recv(64).split(b" ") + [b"", b""])[1].decode() or CLOSED
        except OSError:
            return CLOSED

    return send


def nested(depth: int) -> dict:
    """A schema of objects in objects."""
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def blows() -> Iterator[Blow]:
    """All of them, in order."""

    def chat(name: str, **fields: Any) -> Blow:
        return Blow(f"chat: {name}", post(CHAT, {"model": "m", "messages": HELLO, "max_tokens": 8, "temperature": 0} | fields))

    def complete(name: str, **fields: Any) -> Blow:
        return Blow(f"completions: {name}", post(COMPLETIONS, {"model": "m", "prompt": "Hello", "max_tokens": 8} | fields))

    def native(name: str, top: dict | None = None, **params: Any) -> Blow:
        body = {"sampling_params": {"max_new_tokens": 8, "temperature": 0} | params} | (top or {})
        if not {"input_ids", "input_embeds", "text"} & body.keys():
            body["text"] = "Hello"
        return Blow(f"generate: {name}", post(GENERATE, body))

    # Too much of everything.
    yield chat("a prompt of 4 MB", messages=[{"role": "user", "content": "river stone " * 350_000}])
    yield chat("20,000 messages", messages=HELLO * 20_000)
    yield complete("10,000 prompts, most of them empty", prompt=["a"] + [""] * 9_999)
    yield native("500,000 token ids", {"input_ids": [5] * 500_000})
    yield native("a rid of 1 MB", {"rid": "r" * 2**20})
    yield chat("5,000 stop strings", stop=[f"stop {i}" for i in range(5_000)])
    yield native("5,000 stop strings", stop=[f"stop {i}" for i in range(5_000)])
    yield native("a stop string of 1 MB", stop=["s" * 2**20])
    yield native("100,000 stop tokens", stop_token_ids=list(range(100_000)))
    yield native("a stop expression that backtracks", {"text": "a" * 60}, stop_regex="(a+)+$", max_new_tokens=40)
    yield native("2,000 stop expressions", stop_regex=["[a-z]{1,9}x"] * 2_000)
    yield chat("n of 100,000", n=100_000)
    yield chat("n of 10^12", n=10**12)
    yield complete("best_of 10^9", best_of=10**9)
    yield native("n of 10^9", n=10**9)
    yield native("n of 1.5", n=1.5)
    yield native("n of text", n="4")
    yield native("10^12 new tokens", max_new_tokens=10**12)
    yield chat("10^30 tokens", max_tokens=10**30)
    yield chat("10^9 log-probabilities", logprobs=True, top_logprobs=10**9)
    yield native("10^9 log-probabilities", {"return_logprob": True, "top_logprobs_num": 10**9})
    yield native("a bias for 100,000 tokens", logit_bias={str(i): 1.0 for i in range(100_000)})
    yield chat("2,000 tools", tools=[{"type": "function", "function": {"name": f"t{i}", "parameters": nested(3)}} for i in range(2_000)], tool_choice="required")
    # Not what it says it is.
    yield Blow("chat: invalid UTF-8", post(CHAT, b'{"model": "m", "messages": [{"role": "user", "content": "\xff\xfe\xc0\xaf"}]}'))
    yield Blow("generate: invalid UTF-8", post(GENERATE, b'{"text": "\xed\xa0\x80\xff", "sampling_params": {}}'))
    yield Blow("generate: half a surrogate pair", post(GENERATE, b'{"text": "\\ud800 a \\udfff", "sampling_params": {"max_new_tokens": 4}}'))
    yield Blow("chat: half a surrogate pair", post(CHAT, b'{"model": "m", "max_tokens": 4, "messages": [{"role": "user", "content": "\\ud83d"}]}'))
    yield Blow("chat: half a surrogate pair as a stop", post(CHAT, b'{"model": "m", "max_tokens": 4, "stop": "\\ud83d", "messages": [{"role": "user", "content": "a"}]}'))
    yield native("NUL and control characters", {"text": "".join(map(chr, range(32))) * 40})
    yield Blow("generate: arrays 100,000 deep", post(GENERATE, b"[" * 100_000))
    yield Blow("generate: objects 50,000 deep", post(GENERATE, b'{"a":' * 50_000 + b"1" + b"}" * 50_000))
    yield Blow("generate: NaN and Infinity", post(GENERATE, b'{"text": "a", "sampling_params": {"temperature": NaN, "top_p": Infinity, "max_new_tokens": 4}}'))
    yield Blow("chat: NaN", post(CHAT, b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "temperature": NaN, "max_tokens": 4}'))
    yield Blow("generate: an empty body", post(GENERATE, b""))
    yield native("an empty prompt", {"text": ""})
    yield native("an empty prompt beside another", {"text": ["a", ""]})
    yield chat("top_k of 2^40", top_k=2**40, temperature=1)
    yield Blow("generate: a number", post(GENERATE, b"7"))
    # Numbers at the edge.
    for name, value in {"temperature": 1e308, "temperature ": 1e-308, "top_p": 1e-300, "min_p": 1.0, "top_k": 2**31, "top_k ": 2**63, "top_k  ": -(2**63)}.items():
        yield native(f"{name.strip()} {value:g}", **{"temperature": 1.0} | {name.strip(): value})
    yield native("repetition_penalty 0", repetition_penalty=0)
    yield native("repetition_penalty 1e-300", repetition_penalty=1e-300)
    yield native("a seed of 2^64", sampling_seed=2**64, temperature=1.0)
    yield native("a bias of 1e39", logit_bias={"5": 1e39})
    yield native("a bias of -1e39 on every token", logit_bias={str(i): -1e29 for i in range(2_000)})
    yield native("a bias on token 10^9", logit_bias={str(10**9): 1.0})
    yield native("a bias on token -7", logit_bias={"-7": 1.0})
    yield native("token ids below zero", {"input_ids": [-1, -(2**31), 5]})
    yield native("token ids beyond the vocabulary", {"input_ids": [10**9, 2**40]})
    yield native("token ids that are fractions", {"input_ids": [1.5, 2.5]})
    yield native("token ids that are truth values", {"input_ids": [True, False]})
    yield native("a stop token of 2^70", stop_token_ids=[2**70])
    yield native("log-probabilities from 10^9", {"return_logprob": True, "logprob_start_len": 10**9})
    yield native("log-probabilities from -10^9", {"return_logprob": True, "logprob_start_len": -(10**9)})
    yield native("log-probability of token 10^9", {"return_logprob": True, "token_ids_logprob": [10**9]})
    yield native("log-probability of token -10^9", {"return_logprob": True, "token_ids_logprob": [-(10**9)]})
    yield native("min_new_tokens beyond max", min_new_tokens=10**6)
    # Grammars.
    yield native("a schema 100 deep", json_schema=json.dumps(nested(100)))
    yield native(f"a schema {DEEP} deep", json_schema=_deep_schema(DEEP))
    yield native("a schema 100,000 deep", json_schema=_deep_schema(100_000))
    yield chat(f"a schema {DEEP // 10} deep", response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": nested(DEEP // 10)}})
    yield native("a schema that is itself", json_schema='{"$ref": "#"}')
    yield native("a schema of an unknown reference", json_schema='{"$ref": "#/definitions/none"}')
    yield native("a schema that refers to a page", json_schema='{"$ref": "http://127.0.0.1:9/schema"}')
    yield native("a schema of 20,000 words", json_schema=json.dumps({"enum": [f"w{i}" for i in range(20_000)]}))
    yield native("a schema of nothing", json_schema=json.dumps({"enum": []}))
    yield native("a schema of a number", json_schema="7")
    yield native("a pattern in a schema that is none", json_schema=json.dumps({"type": "string", "pattern": "(("}))
    yield native("an expression of 10^6 repeats", regex="(a{1,1000}){1,1000}")
    yield native("an expression of 10^9 repeats", regex="a{1,1000000000}")
    yield native("an expression 20,000 deep", regex="(" * 20_000 + "a" + ")" * 20_000)
    yield native("an expression of 200,000 choices", regex="|".join(f"w{i}" for i in range(50_000)))
    yield native("an expression that is invalid UTF-8", regex="\udcff")
    yield native("a grammar that is itself", ebnf="root ::= root")
    yield native("a grammar that begins with itself", ebnf='root ::= root "a" | "b"')
    yield native("a grammar that ends nowhere", ebnf='root ::= "a" root')
    yield native("a grammar 20,000 deep", ebnf="root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000)
    yield native("a grammar of NUL", ebnf='root ::= "\x00"')
    yield native("a structural tag that is none", structural_tag="{}")
    yield chat("a structural tag of nothing", response_format={"type": "structural_tag", "structures": [], "triggers": []})
    yield native("every grammar at once", json_schema="{}", regex="a", ebnf='root ::= "a"')
    # Of the wrong kind, or for another server.
    yield native("custom_params of a wrong kind", custom_params=[1, 2])
    yield native("custom_params 500 deep", custom_params=_deep(500))
    yield native("a stride of text", custom_params={"idlm_stride": "4"})
    yield native("a stride of 10^9", custom_params={"idlm_stride": 10**9})
    yield native("a self-check of one's own", custom_params={"idlm_selfcheck": True})
    yield native("a processor that is none", {"custom_logit_processor": "{}"})
    yield native("a processor that is a pickle", {"custom_logit_processor": '{"callable": "80049503"}'})
    yield native("hidden states", {"return_hidden_states": True})
    yield native("a LoRA adapter", {"lora_path": "/etc/passwd"})
    yield native("a session that is not there", {"session_params": {"id": "x", "rid": "y"}})
    yield native("embeddings of a wrong shape", {"input_embeds": [[0.0] * 3] * 2})
    yield native("embeddings of nothing", {"input_embeds": []})
    yield native("an image", {"image_data": "http://127.0.0.1:9/x.png"})
    yield native("another rank", {"data_parallel_rank": 99})
    yield native("a bootstrap host", {"bootstrap_host": "127.0.0.1", "bootstrap_port": 9, "bootstrap_room": 1})
    yield native("beams", beam_width=4)
    yield native("priority 10^30", {"priority": 10**30})
    yield chat("an image", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}])
    yield chat("an unknown part", messages=[{"role": "user", "content": [{"type": "smell"}]}])
    yield chat("template arguments that collide", chat_template_kwargs={"messages": [], "tokenize": False, "add_generation_prompt": 5, "conversation": 7})
    yield chat("a template of one's own", chat_template="{% for i in range(10**9) %}a{% endfor %}")
    yield chat("a tool without a name", tools=[{"type": "function", "function": {}}])
    yield chat("a tool's schema that is itself", tools=[{"type": "function", "function": {"name": "a", "parameters": {"$ref": "#"}}}], tool_choice="required")
    yield Blow("responses: an item of an unknown kind", post(RESPONSES, {"model": "m", "input": [{"type": "smell"}]}))
    yield Blow("responses: one that is not there", post(RESPONSES, {"model": "m", "input": "a", "previous_response_id": "resp_none"}))
    yield Blow("messages: blocks of an unknown kind", post(MESSAGES, {"model": "m", "max_tokens": 4, "messages": [{"role": "user", "content": [{"type": "smell"}]}]}))
    yield Blow("embeddings of a model that has none", post("/v1/embeddings", {"model": "m", "input": "Hello"}))
    yield Blow("encode of a model that has none", post("/encode", {"text": "Hello"}))
    yield Blow("classify of a model that has none", post("/classify", {"text": "Hello"}))
    yield Blow("score", post("/v1/score", {"model": "m", "query": "a", "items": ["b"] * 500, "label_token_ids": [10**9]}))
    yield Blow("rerank", post("/v1/rerank", {"query": "a", "documents": ["b"] * 100}))
    yield Blow("tokenize 4 MB", post("/v1/tokenize", {"model": "m", "prompt": "a b " * 10**6}))
    yield Blow("detokenize what is none", post("/v1/detokenize", {"model": "m", "tokens": [10**9, -5]}))
    yield Blow("abort of nobody", post("/abort_request", {"rid": ""}))
    # The scheduler itself looks for the expression; Python's re would need 2^60 steps.
    yield native("a stop expression that no automaton searches", stop_regex=r"(a+)+\1b", max_new_tokens=60, logit_bias={str(token("a")): 100.0})
    yield native("a stop expression that never comes to an end", stop_regex="(a+)+b", max_new_tokens=60, logit_bias={str(token("a")): 100.0})
    # On the wire.
    yield Blow("a body that never ends", raw(b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{"))
    yield Blow("a chunk of a negative size", raw(b"POST /generate HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n"))
    yield Blow("no HTTP", raw(b"\x16\x03\x01\x02\x00\x01\x00" + b"\xff" * 4096))
    yield Blow("a header of 1 MB", raw(b"GET /v1/models HTTP/1.1\r\nX: " + b"a" * 2**20 + b"\r\n\r\n"))
    yield Blow("a path that climbs", raw(b"GET /../../etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n"))


def _deep(depth: int) -> dict:
    found: dict = {}
    for _ in range(depth):
        found = {"a": found}
    return found


def _deep_schema(depth: int) -> str:
    return '{"type":"object","properties":{"a":' * depth + "{}" + "}}" * depth
