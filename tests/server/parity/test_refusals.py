"""What AR refuses is refused in the same words and the same shape, and the server goes on."""

import json

import pytest

from tests.server.harness import CHECKPOINT
from tests.server.parity.cases import CHAT, COMPLETIONS, GENERATE, MESSAGES, RESPONSES, TOOLS, Case
from tests.server.parity.compare import ask, differences

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = [{"type": "function", "function": TOOLS[0]}]


def native(**params):
    return GENERATE, {"text": "Hello", "sampling_params": {"max_new_tokens": 4, "temperature": 0, **params}}


def chat(**fields):
    return CHAT, {"model": CHECKPOINT, "messages": HELLO, "max_tokens": 4, "temperature": 0, **fields}


def complete(**fields):
    return COMPLETIONS, {"model": CHECKPOINT, "prompt": "Hello", "max_tokens": 4, "temperature": 0, **fields}


def respond(**fields):
    return RESPONSES, {"model": CHECKPOINT, "input": "Hello", "max_output_tokens": 8, "temperature": 0, **fields}


def message(**fields):
    return MESSAGES, {"model": CHECKPOINT, "messages": HELLO, "max_tokens": 4, "temperature": 0, **fields}


BAD = {
    "sampling": [
        native(temperature=-1), native(top_p=0), native(top_p=1.5), native(min_p=2), native(top_k=-5), native(top_k=2**32, temperature=1), chat(top_k=2**40, temperature=1), native(max_new_tokens=-1),
        chat(temperature=-0.5), chat(top_p=2), complete(top_p=-1), respond(temperature=-1), message(top_p=3),
    ],
    "seed": [chat(seed=2**63), chat(seed="x"), complete(seed=1.5)],
    "penalties": [
        native(frequency_penalty=3), native(presence_penalty=-3), native(repetition_penalty=3), native(repetition_penalty=-1),
        native(min_new_tokens=9), native(min_new_tokens=-1), chat(frequency_penalty=2.5), complete(presence_penalty="much"), respond(repetition_penalty=5.0),
    ],
    "logit_bias": [native(logit_bias={"5": 1e39}), chat(logit_bias={"5": -1e31}), native(logit_bias={"99999": 1.0}), chat(logit_bias={"-1": 1.0}), complete(logit_bias={"a": 1.0}), complete(logit_bias=[1])],
    "logprobs": [chat(top_logprobs=3), chat(logprobs=True, top_logprobs=-1), chat(logprobs=True, top_logprobs=10**6), complete(logprobs=10**6), complete(logprobs="many"), respond(top_logprobs=3, include=["nothing"])],
    "grammar": [
        native(regex="("), native(json_schema="{"), native(ebnf="root ="), native(regex="a", ebnf='root ::= "a"'),
        chat(response_format={"type": "json_schema"}), chat(response_format={"type": "poem"}), complete(regex="[z-a]"),
    ],
    "tools": [
        chat(tool_choice="required"), chat(tools=TOOL, tool_choice={"type": "function", "function": {"name": "none"}}),
        chat(tools=TOOL, tool_choice="required", regex="a"), chat(tools=[{"type": "function"}]), message(tools=[{"name": "x"}]),
    ],
    "stops": [native(stop=[1]), native(stop_regex="("), chat(stop=["a"] * 40), chat(max_tokens=0), complete(max_tokens=-2), native(max_new_tokens=10**6)],
    "batches": [
        native(n=-1), native(n=1025), chat(n=5000), complete(n=10**9),
        (GENERATE, {"input_embeds": [[0.0] * 256] * 3, "sampling_params": {"max_new_tokens": 2}}),
        (GENERATE, {"input_embeds": [[[0.0] * 256] * 3] * 2, "sampling_params": {"max_new_tokens": 2}}),
        (GENERATE, {"text": "a", "input_ids": [5], "sampling_params": {}}), (GENERATE, {"sampling_params": {}}),
        (GENERATE, {"text": "", "sampling_params": {"max_new_tokens": 1}}), (GENERATE, {"text": ["Hi", ""], "sampling_params": {"max_new_tokens": 3}}),
        (GENERATE, {"text": "", "stream": True, "sampling_params": {"max_new_tokens": 4}}), complete(prompt=["a", ""]),
        (GENERATE, {"input_ids": [], "sampling_params": {}}), (GENERATE, {"input_ids": [5, -1], "sampling_params": {}}),
        (GENERATE, {"input_ids": [10**6], "sampling_params": {}}), complete(prompt=[5, 10**6]), (GENERATE, {"input_ids": [5] * 5000, "sampling_params": {}}),
        native(n=0), chat(n=0), complete(prompt=[]), complete(prompt=None), complete(prompt="word " * 5000), chat(messages=[]),
    ],
    "custom_processors": [chat(custom_logit_processor=7), (GENERATE, {"text": "a", "custom_logit_processor": 7, "sampling_params": {"max_new_tokens": 2}})],
    "hidden_lora": [
        (GENERATE, {"text": "a", "return_hidden_states": True, "sampling_params": {"max_new_tokens": 2}}), chat(return_hidden_states=True),
        (GENERATE, {"text": "a", "lora_path": "adapter", "sampling_params": {"max_new_tokens": 2}}), chat(lora_path="adapter"), chat(model="base:adapter"),
    ],
    "endpoints": [
        chat(messages=[{"role": "stranger", "content": "x"}]), (CHAT, {"max_tokens": 4}), (COMPLETIONS, []), (RESPONSES, {"model": "unknown", "input": "x"}),
        respond(previous_response_id="resp_unknown"), respond(input=7), (MESSAGES, {"model": "m", "messages": HELLO}), message(messages=[]), message(max_tokens=0),
        ("/v1/tokenize", {}), ("/v1/detokenize", {"tokens": "x"}), ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [10**6]}),
        ("/v1/embeddings", {"model": "m", "input": "x"}), ("/v1/nothing", {}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("key", [pytest.param(key, marks=pytest.mark.parity(key)) for key in BAD])
def test_a_bad_request_gets_the_answer_of_ar(ar, isd, key):
    refused, found = 0, []
    for number, (path, body) in enumerate(BAD[key]):
        case = Case(number, path, body, frozenset(), False)
        want, got = ask(ar, case), ask(isd, case)
        refused += want.status >= 400
        # An answer (AR serves the request) may be sampled; a refusal must be equal to the letter.
        lines = differences(want, got, exact=want.status >= 400)
        if lines:
            found.append("\n  ".join([f"{path} {json.dumps(body)[:300]}", *lines[:4]]))
    print(f"{key}: {refused} of {len(BAD[key])} refused, as by AR")
    assert not found, "\n".join(found)
    assert refused, "nothing was refused"
    assert isd.alive() and isd.generate("Hello", temperature=0, max_new_tokens=2)["meta_info"]["completion_tokens"] >= 1


@pytest.mark.parametrize(
    "path, body, says",
    [
        (GENERATE, {"text": "", "sampling_params": {"max_new_tokens": 1}}, "the prompt has no tokens"),
        (GENERATE, {"text": ["Hello", ""], "sampling_params": {"max_new_tokens": 3}}, "the prompt has no tokens"),
        (*complete(prompt=["Hello", ""]), "the prompt has no tokens"),
        (*chat(top_k=2**32, temperature=1), "top_k=4294967296 is not valid"),
        (*chat(logit_bias={"5": 1e39}), "logit_bias of token 5 is 1e+39"),
        (*native(n=-1), "n=-1 is out of range"),
    ],
)
def test_what_would_end_the_scheduler_or_mean_nothing_is_refused_in_ar_too(ar, isd, path, body, says):
    for server in (ar, isd):
        reply = server.post(path, body)
        assert reply.status_code == 400 and says in reply.text and "allowed: " in reply.text, (server.port, reply.text)
        assert server.alive()
