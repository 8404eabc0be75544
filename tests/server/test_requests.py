"""What a request may ask for beside sampling: served as AR serves it, or refused by name; never a dead server."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.harness import chat, differing, ids, prompts
from tests.server.parity.cases import token
from tests.server.parity.processors import Fails

STORY = chat("Tell me a story about Tavo.")
SCHEMA = json.dumps({"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer"}}, "required": ["name", "n"]})
FEATURES = {
    "logit bias": {"logit_bias": {"100": 5.0, "200": -3.0}},
    "bias on MASK": {"logit_bias": {"3": 100.0}},
    "regex": {"regex": "[a-z ]{10,30}"},
    "json schema": {"json_schema": SCHEMA},
    "frequency penalty": {"frequency_penalty": 0.7},
    "presence penalty": {"presence_penalty": 0.9},
    "repetition penalty": {"repetition_penalty": 1.3},
    "min_new_tokens": {"min_new_tokens": 30},
}


@pytest.mark.parity("penalties", "logit_bias", "grammar")
@pytest.mark.parametrize("name", FEATURES)
def test_greedy_text_is_that_of_ar(ar, isd, name):
    """One request at a time: SGLang's overlapped penalties depend on which batches come between."""
    calls = [{"prompt": p, "temperature": 0, "max_new_tokens": 40, **FEATURES[name]} for p in (STORY, *prompts(5, seed=131))]
    want, got = ar.many(calls, 1), isd.many(calls, 1)
    assert not differing(want, got)
    assert not any(3 in ids(a) for a in got), "MASK was emitted"


def test_single_and_strided_requests_share_batches(ar, isd):
    calls = [{"prompt": p, "temperature": 0, "max_new_tokens": 30} for p in prompts(40, seed=132)]
    extra = [{}, {}, FEATURES["logit bias"], FEATURES["regex"], FEATURES["json schema"]]
    calls = [{**c, **extra[i % 5]} for i, c in enumerate(calls)]
    assert not differing(ar.many(calls, 12), isd.many(calls, 12))


@pytest.mark.parity("grammar")
def test_grammars_hold_under_overlap_and_mixed_chunks(ar, isd_tight):
    """Prefill chunks are mixed with the decode rows of grammar requests while the previous step is still in flight."""
    calls = []
    for i, p in enumerate(prompts(60, seed=133)):
        calls.append({"prompt": p, "temperature": 0, "max_new_tokens": 30, **(FEATURES["regex"], FEATURES["json schema"], {})[i % 3]})
    want, got = ar.many(calls, 8), isd_tight.many(calls, 8)
    assert not differing(want, got)


@pytest.mark.parity("logprobs")
@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 0.8, "sampling_seed": 4}, {"temperature": 0, "presence_penalty": 0.5}])
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_logprobs_are_those_of_ar(ar, isd, stride, params):
    call = {"prompt": STORY, "max_new_tokens": 40, "return_logprob": True, "top_logprobs_num": 3, **params}
    want, got = ar.generate(**call), isd.generate(**call, stride=stride)
    assert ids(want) == ids(got)
    w, g = want["meta_info"], got["meta_info"]
    assert len(g["output_token_logprobs"]) == len(ids(got)) == len(g["output_top_logprobs"])
    for (lw, tw, _), (lg, tg, _) in zip(w["output_token_logprobs"], g["output_token_logprobs"], strict=True):
        assert tw == tg and lg == pytest.approx(lw, abs=2e-3)
    for top_w, top_g in zip(w["output_top_logprobs"], g["output_top_logprobs"], strict=True):
        assert [x[0] for x in top_g] == pytest.approx([x[0] for x in top_w], abs=2e-3)


@pytest.mark.parametrize("server", ["ar", "isd"])
def test_a_stop_expression_that_backtracks_stops_nobody(request, server):
    """``re`` would take 2^80 steps at the 80th a, in the scheduler itself."""
    served = request.getfixturevalue(server)
    forced = {"prompt": STORY, "temperature": 0, "max_new_tokens": 80, "ignore_eos": True, "logit_bias": {str(token("a")): 100.0}}
    answers = served.many([{**forced, "stop_regex": "(a+)+b"}, {**forced, "stop_regex": "(a|aa)+b"}, {**forced, "stop_regex": "a{7}$"}, forced], 4)
    assert [ids(a)[0] for a in answers] == [token("a")] * 4
    assert [len(ids(a)) for a in answers] == [80, 80, 7, 80]


@pytest.mark.parametrize(
    "params, names",
    [
        ({"beam_width": 2, "n": 2}, "beam_width"),
        ({"custom_params": [1]}, "custom_params"),
        ({"custom_params": "idlm_stride"}, "custom_params"),
        ({"custom_params": 7}, "custom_params"),
        ({"logit_bias": {"3": 1e39}}, "logit_bias"),
        ({"logit_bias": {"5": -1e38}}, "logit_bias"),
        ({"top_k": 2**40, "temperature": 1.0}, "top_k"),
        ({"sampling_seed": 2**63}, "seed"),
        ({"stop_regex": ["fine", r"(a+)+\bb"]}, "stop_regex"),
        ({"stop_regex": "("}, "stop_regex"),
    ],
)
def test_a_hostile_parameter_is_a_400_that_names_it(isd, params, names):
    reply = isd.post("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 4, **params}})
    assert reply.status_code == 400 and names in reply.text, reply.text
    assert isd.alive() and isd.generate("Hi", temperature=0, max_new_tokens=2)["meta_info"]["completion_tokens"] >= 1


@pytest.mark.parity("hidden_lora")
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_refusal_is_a_400_in_openai_shape_before_a_stream_begins(isd, path, streamed):
    said = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
    counter = 'idlm:requests_total{mode="refused",reason="stride"}'
    before = isd.metrics().get(counter, 0)
    reply = isd.post(path, {"model": "m", "max_tokens": 4, "stream": streamed, "custom_params": {"idlm_stride": 99}, **said})
    error = reply.json()
    assert reply.status_code == error["code"] == 400 and error["object"] == "error"
    assert error["message"] == "custom_params.idlm_stride=99 is not valid; allowed: an integer from 1 to 16"
    assert isd.metrics()[counter] == before + 1


@pytest.mark.parametrize("arm", ["ar", "isd"])
@pytest.mark.parametrize("processor", ["not one", "{}", '{"callable": "zz"}', '{"callable": "00"}', "[1]"])
def test_a_processor_that_cannot_be_read_is_a_400_that_names_it(request, arm, processor):
    server = request.getfixturevalue(arm)
    reply = server.post("/generate", {"text": "Hi", "custom_logit_processor": processor, "sampling_params": {"max_new_tokens": 2}})
    assert reply.status_code == 400 and "custom_logit_processor cannot be read" in reply.text, reply.text
    assert server.alive() and server.generate("Hi", temperature=0, max_new_tokens=2)["meta_info"]["completion_tokens"] >= 1


@pytest.mark.parametrize("arm", ["ar", "isd", "isd_sync"])
def test_a_processor_that_fails_ends_its_own_requests_alone(request, arm):
    """Also beside requests of the same processor over which it does not fail, and whose logits are as it leaves them."""
    server, ways = request.getfixturevalue(arm), [None, "raises", "shape", None, "exits", "nothing", None, ""]

    def ask(way):
        params = {"temperature": 0, "max_new_tokens": 30, "ignore_eos": True, **({} if way is None else {"custom_params": {"fails": way}})}
        return server.post("/generate", {"text": "Hi there, you. " * 20, "sampling_params": params, "custom_logit_processor": Fails.to_str() if way is not None else ""})

    with ThreadPoolExecutor(len(ways)) as pool:
        replies = list(pool.map(ask, ways))
    for way, reply in zip(ways, replies):
        if way:
            assert reply.status_code == 400 and "custom_logit_processor Fails failed: " in reply.text, reply.text
        else:
            assert reply.status_code == 200 and reply.json()["output_ids"] == replies[0].json()["output_ids"]
    assert server.alive()


def test_sessions_are_continued_as_in_ar(ar, isd):
    """SGLang's sessions: a request that goes on where another ended, penalties and grammars included."""
    found = []
    for server in (ar, isd):
        session = server.post("/open_session", {"capacity_of_str_len": 2000}).json()
        texts, rid = [], None
        for ids_in, extra in [([5, 6, 7], {}), ([310, 331], {"presence_penalty": 0.9}), ([342], {"regex": "[a-z ]{5,20}", "frequency_penalty": 0.5})]:
            body = {"input_ids": ids_in, "session_params": {"id": session, "rid": rid}, "sampling_params": {"temperature": 0, "max_new_tokens": 20, **extra}}
            answer = server.post("/generate", body).json()
            rid = answer["meta_info"]["id"]
            texts.append((answer["text"], ids(answer), answer["meta_info"]["prompt_tokens"]))
        assert server.post("/close_session", {"session_id": session}).status_code == 200
        found.append(texts)
    assert found[0] == found[1] and found[1][2][2] > 5
