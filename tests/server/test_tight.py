"""A KV pool far too small: retraction, disconnects, aborts, and nothing is lost or leaked."""

import json
import random
import time

import pytest
import requests

from tests.server.fleet import server_fixture
from tests.server.harness import CHECKPOINT, Server, differing, prompts
from tests.server.parity.cases import tokenizer


def hang_up(server, prompt, after):
    """A client that disconnects while its answer streams."""
    body = {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 400}, "stream": True}
    try:
        with requests.post(server.url + "/generate", json=body, stream=True, timeout=(10, after)) as reply:
            for _ in reply.iter_lines():
                pass
    except requests.RequestException:
        pass


def wait_idle(server, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        running = server.idle_tokens()[1]
        if running == 0:
            return
        time.sleep(0.2)
    raise AssertionError(f"still busy: {server.idle_tokens()}")


@pytest.mark.parity("lifecycle")
def test_retraction_and_disconnects_do_not_change_answers(ar, isd_tight):
    from concurrent.futures import ThreadPoolExecutor

    rng = random.Random(1)
    # Long answers without ignore_eos, for which SGLang reserves the whole length: then it never has to retract.
    endless = {"temperature": 0, "max_new_tokens": 120, "logit_bias": {"2": -100}}
    calls = [{"prompt": p, **endless} for p in prompts(72, seed=51)]
    left = ar.many(calls, 16)
    with ThreadPoolExecutor(6) as noise:
        leaving = [noise.submit(hang_up, isd_tight, p, rng.uniform(0.05, 1.0)) for p in prompts(48, seed=52)]
        right = isd_tight.many([{**c, "stride": rng.choice([2, 4, 8])} for c in calls], 24)
        for f in leaving:
            f.result()
    different = differing(left, right)
    assert not different, [(calls[i]["prompt"], left[i]["text"], right[i]["text"]) for i in different[:2]]
    retractions = isd_tight.log.read_text(errors="replace").count("Retract requests.")
    print(f"{len(calls)} answers identical, {retractions} retractions, 48 disconnects")
    assert retractions > 0, "the pool was not tight enough to retract"
    wait_idle(isd_tight)


@pytest.mark.parity("lifecycle")
@pytest.mark.parametrize("stride", [8, None])
def test_an_answer_may_grow_to_the_end_of_the_pool(ar, isd_tight, stride):
    """The last columns are fewer than a step's rows."""
    wait_idle(isd_tight)
    call = {"prompt": prompts(1, seed=53)[0], "temperature": 0, "ignore_eos": True, "max_new_tokens": 1200}
    got = isd_tight.generate(**call, **({} if stride is None else {"stride": stride}))
    tokens = got["meta_info"]["prompt_tokens"] + got["meta_info"]["completion_tokens"]
    assert got["meta_info"]["finish_reason"]["type"] == "length" and tokens >= 1200 - 2, got["meta_info"]
    assert not differing([ar.generate(**call | {"max_new_tokens": got["meta_info"]["completion_tokens"]})], [got])
    wait_idle(isd_tight)


@pytest.mark.parity("lifecycle")
def test_every_slot_is_free_after_mixed_requests_with_aborts(isd_tight):
    """SGLang checks its own pools when idle and dies on a leak; afterwards a flush must give back the whole pool."""
    from concurrent.futures import ThreadPoolExecutor

    rng = random.Random(2)
    texts = prompts(1200, seed=61)

    def one(i):
        kind = rng.randrange(5)
        if kind == 0:
            hang_up(isd_tight, texts[i], rng.uniform(0.01, 0.2))
            return
        params = {"max_new_tokens": rng.randrange(1, 24), "temperature": rng.choice([0, 0.7, 1.0])}
        if kind == 1:
            params |= {"sampling_seed": i, "top_p": 0.8}
        if kind == 2:
            params |= {"presence_penalty": 0.5}
        rid = f"job-{i}"
        if kind == 3:
            with ThreadPoolExecutor(1) as pool:
                call = pool.submit(isd_tight.post, "/generate", {"text": texts[i], "rid": rid, "sampling_params": params | {"max_new_tokens": 200, "ignore_eos": True}})
                time.sleep(rng.uniform(0, 0.2))
                isd_tight.post("/abort_request", {"rid": rid})
                call.result()
            return
        isd_tight.generate(texts[i], stride=rng.choice([1, 2, 4, 8]), **params)

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(one, range(len(texts))))
    wait_idle(isd_tight)
    time.sleep(1.0)
    assert requests.post(isd_tight.url + "/flush_cache", timeout=30).status_code == 200
    time.sleep(1.0)
    assert isd_tight.alive() and isd_tight.idle_tokens() == (0, 0)
    assert isd_tight.generate("Hello", temperature=0, max_new_tokens=4)["meta_info"]["completion_tokens"] >= 1
    print(f"{len(texts)} requests, idle: {isd_tight.idle_tokens()} tokens and requests in use")


def test_an_echoed_prompt_keeps_its_logprobs_where_its_request_is_retracted_before_its_first_token(ar, isd_tight):
    """`/v1/completions` takes them from a stream's first event."""
    from concurrent.futures import ThreadPoolExecutor

    def prompt_logprobs(server, text):
        body = {"model": "m", "prompt": text, "max_tokens": 3, "temperature": 0, "stream": True, "echo": True, "logprobs": 1}
        with server.post("/v1/completions", body, stream=True) as reply:
            events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith(b"data: {")]
        choices = [choice for event in events for choice in event["choices"]]
        return [p for choice in choices for p in (choice["logprobs"] or {}).get("token_logprobs", [])], choices[0]["text"]

    # Each beside another: SGLang retracts all requests but one.
    texts = [f"{i} {text}" for i, text in enumerate(prompts(150, seed=54))]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(lambda text: prompt_logprobs(isd_tight, text), texts))
    assert all(found[:1] == [None] and first.startswith(text) for text, (found, first) in zip(texts, got))
    for i in range(0, len(texts), 50):
        assert [p for p in got[i][0] if p is not None] == pytest.approx([p for p in prompt_logprobs(ar, texts[i])[0] if p is not None], abs=2e-3)


@server_fixture
def mixed(logs):
    """The scheduler of a CPU: decode steps in the forwards of prompts, here under a pool that runs full; survivors as a chain."""
    flags = ["--disable-overlap-schedule", "--max-total-tokens", "900", "--chunked-prefill-size", "32", "--schedule-conservativeness", "0.05"]
    env = {"IDLM_STRIDE": "auto", "IDLM_SALVAGE": "chain"}
    return Server("mixed", CHECKPOINT, logs, "--speculative-algorithm", "ISD", "--enable-metrics", *flags, env=env)


def test_retraction_between_mixed_steps(ar, mixed):
    rng = random.Random(3)
    endless = {"max_new_tokens": 100, "logit_bias": {"2": -100}}
    calls = [{"prompt": p, "temperature": i % 2, "sampling_seed": i, **endless} for i, p in enumerate(prompts(60, seed=53))]
    left = ar.many(calls, 16)
    right = mixed.many([{**c, "stride": rng.choice([None, 2, 4, 8])} for c in calls], 20)
    assert not differing(left, right)
    assert mixed.log.read_text(errors="replace").count("Retract requests.") > 0, "the pool was not tight enough to retract"
    assert mixed.metrics()["idlm:mixed_steps_total"] > 20
    a_prompt_in_chunks_beside_one_long_answer(ar, mixed)
    wait_idle(mixed)
    time.sleep(1.0)
    assert requests.post(mixed.url + "/flush_cache", timeout=30).status_code == 200
    time.sleep(1.0)
    assert mixed.alive() and mixed.idle_tokens() == (0, 0)


def a_prompt_in_chunks_beside_one_long_answer(ar, server):
    """The two fill the pool: the answer makes room for the chunks and comes behind them; SGLang would abort it, as the last one that runs."""
    from concurrent.futures import ThreadPoolExecutor

    long = {"prompt": [5, 6, 7], "temperature": 0, "max_new_tokens": 600, "logit_bias": {"2": -100}, "stride": 4}
    chunked = [{"prompt": random.Random(i).choices(range(300, 1000), k=random.Random(i).randrange(300, 600)), "temperature": 0, "max_new_tokens": 2} for i in range(400)]
    want, found = ar.many([{**long, "stride": None}], 1), 0
    with ThreadPoolExecutor(1) as pool:
        while not found:
            answer = pool.submit(server.many, [long], 1)
            while not answer.done():
                assert chunked, "no prompt's chunks met the end of the pool"
                server.many([chunked.pop()], 1)
            assert not differing(want, answer.result())
            found = server.log.read_text(errors="replace").count("is not aborted but retracted")
    print(f"{found} times a long answer was retracted for a prompt's chunks, {len(chunked)} prompts left")


@pytest.mark.parametrize("small", ["small_1", "small_64"])
def test_wide_steps_in_a_small_context_stay_inside_the_request_table(ar, request, small):
    """W = 31 rows behind the last token of the context."""
    server = request.getfixturevalue(small)
    texts = [tokenizer().encode(p[:60]).ids for p in prompts(40, seed=71)]
    calls = [{"prompt": p, "temperature": 0, "ignore_eos": True, "max_new_tokens": 60} for p in texts]
    got = server.many(calls, 16)
    want = ar.many([{**c, "max_new_tokens": a["meta_info"]["completion_tokens"]} for c, a in zip(calls, got)], 16)
    assert [a["output_ids"] for a in got] == [a["output_ids"] for a in want]
    wait_idle(server)
    assert server.alive()
