"""Every sampled answer says which seed reproduces it, and at one token per step it does."""

import json
import random

import pytest
import requests

from tests.server.harness import chat, ids, prompts

SAMPLED = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 5, "min_p": 0.05},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.9},
]


def seed_of(answer) -> int:
    seed = answer["meta_info"]["seed"]
    assert type(seed) is int and 0 <= seed < 2**53
    return seed


def unseeded(count, place, **params):
    """Sampled requests without a seed, of every kind of truncation."""
    return [{"prompt": p, "max_new_tokens": 32, **SAMPLED[i % len(SAMPLED)], **params} for i, p in enumerate(prompts(count, seed=place))]


def replayed(server, calls, answers, clients, **extra):
    """The answers to the same requests under the seeds that ``answers`` report."""
    seeded = [{**c, "sampling_seed": seed_of(a), **extra} for c, a in zip(calls, answers, strict=True)]
    return server.many(seeded, clients)


def chunks(server, body):
    """The events of a streamed ``/generate``."""
    lines = server.post("/generate", {**body, "stream": True}, stream=True).iter_lines()
    return [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]


@pytest.mark.parity("seed")
def test_unseeded_answers_replay_at_one_token_per_step_and_in_ar(ar, isd):
    """Answered in mixed batches at mixed strides, asked again alone at stride 1, and of the AR server."""
    rng = random.Random(11)
    calls = unseeded(80, 201)
    answers = isd.many([{**c, "stride": rng.choice([1, 2, 3, 4, 8, 16])} for c in calls], 16)
    assert len({seed_of(a) for a in answers}) == len(calls), "every request draws a seed of its own"
    singly = replayed(isd, calls, answers, 1, stride=1)
    plain = replayed(ar, calls, answers, 8)
    same = [sum(ids(a) == ids(b) for a, b in zip(answers, again)) for again in (singly, plain)]
    print(f"unseeded answers replayed: {same[0]}/{len(calls)} at one token per step, {same[1]}/{len(calls)} by the AR server")
    assert same == [len(calls)] * 2
    assert all(seed_of(a) == seed_of(b) for a, b in zip(answers, singly)), "a client's seed is reported as it came"


def test_requests_that_decode_singly_have_a_seed_too(isd):
    calls = unseeded(12, 202, regex="[a-z ]{10,30}") + unseeded(12, 203, stride=1)
    answers = isd.many(calls, 8)
    for first, again in zip(answers, replayed(isd, calls, answers, 3)):
        assert ids(first) == ids(again)


def test_greedy_answers_have_no_seed(ar, isd):
    for server in (ar, isd):
        assert "seed" not in server.generate("Hello", temperature=0, max_new_tokens=4)["meta_info"]
        assert "seed" not in server.generate("Hello", temperature=0, sampling_seed=5, max_new_tokens=4)["meta_info"]


def test_ar_serving_reports_a_client_s_seed_and_draws_none(ar):
    assert ar.generate("Hello", temperature=1, sampling_seed=5, max_new_tokens=4)["meta_info"]["seed"] == 5
    assert "seed" not in ar.generate("Hello", temperature=1, max_new_tokens=4)["meta_info"]


def test_under_the_rejection_rule_only_a_client_s_seed_is_reported(isd_rejection):
    params = {"temperature": 1.0, "max_new_tokens": 8}
    mixed = [{"prompt": "Hello", **params}, {"prompt": "Hello", **params, "sampling_seed": 9}] * 6
    for call, answer in zip(mixed, isd_rejection.many(mixed, 6)):
        assert answer["meta_info"].get("seed") == call.get("sampling_seed")
        assert ("seed" in answer["meta_info"]) == ("sampling_seed" in call)


def check_stream(server, params):
    events = chunks(server, {"text": chat("Tell me a story about Tavo."), "sampling_params": {"max_new_tokens": 40, **params}})
    assert len(events) > 2
    seeds = {seed_of(e) for e in events}
    assert len(seeds) == 1, "every chunk, the last one included, carries the one seed"
    assert not [k for e in events for k, v in e["meta_info"].items() if k.startswith("idlm") or v == []], "no stray key"
    return events, seeds.pop()


def test_streams_carry_the_seed_in_every_chunk(isd):
    events, seed = check_stream(isd, {"temperature": 1.0})
    again = isd.generate(chat("Tell me a story about Tavo."), stride=1, temperature=1.0, max_new_tokens=40, sampling_seed=seed)
    assert events[-1]["output_ids"] == ids(again)


def test_incremental_streams_carry_the_seed_in_every_chunk(isd_rejection):
    events, seed = check_stream(isd_rejection, {"temperature": 1.0, "sampling_seed": 77})
    again = isd_rejection.generate(chat("Tell me a story about Tavo."), stride=1, temperature=1.0, max_new_tokens=40, sampling_seed=77)
    assert seed == 77 and [t for e in events for t in e["output_ids"]] == ids(again)


def test_several_choices_have_a_seed_each(isd):
    call = {"text": chat("Tell me a story."), "sampling_params": {"temperature": 1.0, "max_new_tokens": 24, "n": 4}}
    answers = isd.post("/generate", call).json()
    assert len({seed_of(a) for a in answers}) == 4
    for answer in answers:
        again = isd.generate(call["text"], stride=1, temperature=1.0, max_new_tokens=24, sampling_seed=seed_of(answer))
        assert ids(answer) == ids(again)


def test_openai_answers_carry_the_seed_where_they_carry_meta_info(isd):
    ask = {"model": "default", "messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 1.0, "max_tokens": 24, "n": 2}
    choices = isd.post("/v1/chat/completions", {**ask, "return_meta_info": True}).json()["choices"]
    for choice in choices:
        again = {**ask, "n": 1, "seed": seed_of(choice), "custom_params": {"idlm_stride": 1}}
        assert isd.post("/v1/chat/completions", again).json()["choices"][0]["message"] == choice["message"]
    assert seed_of(choices[0]) != seed_of(choices[1])


@pytest.mark.parity("seed")
def test_retraction_and_resumption_keep_the_seed(ar, isd_tight):
    calls = [{"prompt": p, "temperature": 1.0, "max_new_tokens": 120, "logit_bias": {"2": -100}} for p in prompts(60, seed=204)]
    answers = isd_tight.many([{**c, "stride": 2 + i % 7} for i, c in enumerate(calls)], 24)
    retracted = sum(a["meta_info"]["num_retractions"] > 0 for a in answers)
    same = sum(ids(a) == ids(b) for a, b in zip(answers, replayed(ar, calls, answers, 16)))
    print(f"{retracted} of {len(calls)} answers were retracted and resumed; {same} replayed by the AR server")
    assert retracted > 0 and same == len(calls)


@pytest.mark.parametrize("name", ["small_1", "small_64"])
def test_the_seed_needs_no_detokenizer(request, name):
    server = request.getfixturevalue(name)
    body = {"input_ids": [5, 6, 7, 8], "sampling_params": {"temperature": 1.0, "max_new_tokens": 24, "ignore_eos": True}}
    first = server.post("/generate", body).json()
    seeds = {seed_of(e) for e in chunks(server, body)}
    assert len(seeds) == 1
    refused = server.post("/idlm/decode", {"prompt": "x"})
    assert refused.status_code == 400 and "--skip-tokenizer-init" in refused.text
    body["sampling_params"] |= {"sampling_seed": seed_of(first), "custom_params": {"idlm_stride": 1}}
    assert requests.post(server.url + "/generate", json=body, timeout=60).json()["output_ids"] == first["output_ids"]
