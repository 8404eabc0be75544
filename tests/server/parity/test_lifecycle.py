"""Requests that end early, servers that pause, caches that are flushed: as AR, and nothing stays behind."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.server.harness import chat, differing, prompts
from tests.server.parity.compare import Answer, differences
from tests.server.test_tight import wait_idle

pytestmark = pytest.mark.parity("lifecycle")
# Long enough that it is still being answered when the server is told to do something with it.
LONG = {"temperature": 0, "max_new_tokens": 3000, "ignore_eos": True}


class Stream:
    """A native streamed request; iterating gives its chunks."""

    def __init__(self, server, prompt, rid, **params):
        body = {"text": prompt, "rid": rid, "sampling_params": {**LONG, **params}, "stream": True}
        self.reply = server.post("/generate", body, stream=True)

    def __iter__(self):
        for line in self.reply.iter_lines():
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def flush_until_empty(server):
    """Nothing runs any more, and a flush gives the whole pool back."""
    wait_idle(server)
    assert requests.post(server.url + "/flush_cache?timeout=30", timeout=60).status_code == 200
    assert server.alive() and server.idle_tokens() == (0, 0)


@pytest.fixture(params=["isd", "isd_sync"])
def served(request):
    return request.getfixturevalue(request.param)


def test_abort_request_ends_a_stream_as_in_ar(ar, served):
    ends = []
    for server in (ar, served):
        chunks = iter(Stream(server, chat("What is I-DLM?"), "to-abort"))
        first = next(chunks)
        assert first["meta_info"]["finish_reason"] is None
        assert server.post("/abort_request", {"rid": "to-abort"}).status_code == 200
        last = list(chunks)[-1]
        assert last["text"].startswith(first["text"])
        assert last["meta_info"]["completion_tokens"] == len(last["output_ids"]) < LONG["max_new_tokens"]
        ends.append(last["meta_info"]["finish_reason"])
    assert ends[0]["type"] == "abort" and ends[0] == ends[1]
    flush_until_empty(served)


def test_abort_all_ends_everything_and_only_once(ar, served):
    counts = []
    for server in (ar, served):
        with ThreadPoolExecutor(8) as pool:
            streams = [iter(Stream(server, p, f"all-{i}")) for i, p in enumerate(prompts(8, seed=201))]
            list(pool.map(next, streams))
            assert server.post("/abort_request", {"abort_all": True}).status_code == 200
            ends = [[c["meta_info"]["finish_reason"] for c in rest if c["meta_info"]["finish_reason"]] for rest in pool.map(list, streams)]
        assert all(len(e) == 1 and e[0]["type"] == "abort" for e in ends), ends
        counts.append(len(ends))
    assert counts == [8, 8]
    flush_until_empty(served)


def test_a_disconnected_stream_frees_its_slots_and_leaves_its_neighbours_alone(ar, served):
    calls = [{"prompt": p, "temperature": 0, "max_new_tokens": 40} for p in prompts(24, seed=202)]
    want = ar.many(calls, 8)
    with ThreadPoolExecutor(8) as pool:
        leaving = [Stream(served, p, f"gone-{i}") for i, p in enumerate(prompts(8, seed=203))]
        neighbours = pool.submit(served.many, calls, 8)
        for stream in leaving:
            next(iter(stream))
            stream.reply.close()
        assert not differing(want, neighbours.result())
    flush_until_empty(served)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_paused_answers_go_on_as_if_nothing_had_happened(ar, served, mode):
    """Retracted requests come back by an extend: drafts, counts of penalties and grammars must survive that."""
    kinds = [{}, {"frequency_penalty": 0.6, "repetition_penalty": 1.2}, {"sampling_seed": 5, "temperature": 1.0, "presence_penalty": 0.4}]
    calls = [{"prompt": p, "temperature": 0, "max_new_tokens": 200, "ignore_eos": True, **kinds[i % 3]} for i, p in enumerate(prompts(9, seed=204))]
    want = ar.many(calls, 9)
    witness = Stream(served, prompts(1, seed=205)[0], "witness")
    chunks = iter(witness)
    next(chunks)
    with ThreadPoolExecutor(9) as pool:
        going = [pool.submit(served.generate, **c, stride=[2, 4, 8][i % 3]) for i, c in enumerate(calls)]
        next(chunks)
        assert served.post("/pause_generation", {"mode": mode}).json()["status"] == "ok"
        paused = sum(not f.done() for f in going)
        assert served.post("/continue_generation", {}).json()["status"] == "ok"
        got = [f.result() for f in going]
    served.post("/abort_request", {"rid": "witness"})
    list(chunks)
    assert not differing(want, got)
    assert paused > 0, "everything was answered before the pause"
    flush_until_empty(served)


def test_an_aborting_pause_ends_requests_as_in_ar(ar, served):
    ends = []
    for server in (ar, served):
        chunks = iter(Stream(server, chat("What is I-DLM?"), "paused"))
        next(chunks)
        assert server.post("/pause_generation", {"mode": "abort"}).json()["status"] == "ok"
        ends.append(list(chunks)[-1]["meta_info"]["finish_reason"])
        assert server.post("/continue_generation", {}).json()["status"] == "ok"
        assert server.generate("Hello", temperature=0, max_new_tokens=3)["meta_info"]["completion_tokens"] > 0
    assert ends[0]["type"] == "abort" and ends[0] == ends[1]
    flush_until_empty(served)


def test_flush_cache_forgets_prefixes_and_waits_for_nobody(ar, served):
    """While a request runs a flush is refused; afterwards the cache is empty and fills again."""
    prompt = chat("What is the KV cache? " * 8)  # longer than a page
    for server in (ar, served):
        chunks = iter(Stream(server, prompt, "running"))
        next(chunks)
        busy = requests.post(server.url + "/flush_cache", timeout=30)
        server.post("/abort_request", {"rid": "running"})
        list(chunks)
        assert busy.status_code == 400
    flush_until_empty(served)
    cached = [served.generate(prompt, temperature=0, max_new_tokens=4)["meta_info"]["cached_tokens"] for _ in range(2)]
    assert cached[0] == 0 < cached[1]
    flush_until_empty(served)
    assert served.generate(prompt, temperature=0, max_new_tokens=4)["meta_info"]["cached_tokens"] == 0


def test_streamed_usage_is_that_of_ar_at_every_chunk(ar, served):
    """Continuous usage: each chunk's count of tokens belongs to its text."""
    body = {"model": "m", "messages": [{"role": "user", "content": "What is I-DLM?"}], "temperature": 0, "max_tokens": 50}
    body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "chat_template_kwargs": {"enable_thinking": False}}
    texts = []
    for server in (ar, served):
        known, text = {}, ""
        for line in server.post("/v1/chat/completions", body, stream=True).iter_lines():
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                text += "".join(c["delta"].get("content") or "" for c in chunk["choices"])
                if chunk.get("usage"):
                    known[chunk["usage"]["completion_tokens"]] = text
        texts.append(known)
    shared = texts[0].keys() & texts[1].keys()
    assert len(shared) > 5 and all(texts[0][n] == texts[1][n] for n in shared)
    assert not differences(Answer(200, texts[0][max(texts[0])]), Answer(200, texts[1][max(texts[1])]))
