"""How many tokens a forward commits under each feature: what docs/parity.md says about it."""

import pytest

from tests.server.harness import chat
from tests.server.parity.cases import CALL_REGEX, token
from tests.server.parity.processors import Ban
from tests.server.parity.table import ROWS
from tests.server.test_identity import per_forward

# Questions the embedded checkpoint has learnt, so that its drafts are good.
QUESTIONS = ("What is I-DLM?", "What is ISD?", "What is the default stride?", "Does it run on a CPU?")
ASKED = {
    "sampling": {"temperature": 0.7, "top_p": 0.8},
    "seed": {"temperature": 0.7, "sampling_seed": 7},
    "penalties": {"frequency_penalty": 0.1, "repetition_penalty": 1.02, "min_new_tokens": 8},
    "logit_bias": {"logit_bias": {str(token(" is")): 1.0}},
    "logprobs": {"return_logprob": True, "top_logprobs_num": 3},
    "grammar": {"regex": "[A-Z][A-Za-z0-9 ,.'-]*"},
    "tools": {"regex": CALL_REGEX},
    "stops": {"stop": ["forward."], "stop_token_ids": [token("\n")]},
    "batches": {"n": 1},
    "custom_processors": {},
}


@pytest.mark.parametrize("key", [pytest.param(key, marks=pytest.mark.parity(key)) for key in ASKED])
def test_tokens_per_forward_are_as_the_table_says(isd, key):
    calls = [{"prompt": chat(q), "temperature": 0, "max_new_tokens": 48, "stride": 4, **ASKED[key]} for q in QUESTIONS]
    if key == "custom_processors":
        answers = [isd.post("/generate", body(call)).json() for call in calls]
    else:
        answers = isd.many(calls, 4)
    rate = per_forward(answers)
    print(f"{key}: {rate:.2f} tokens per forward at stride 4")
    assert rate > 1.4 if ROWS[key].strided else rate == 1.0


def body(call):
    params = {k: v for k, v in call.items() if k not in ("prompt", "stride")}
    params["custom_params"] = {"ban": [token(" a")], "idlm_stride": call["stride"]}
    return {"text": call["prompt"], "sampling_params": params, "custom_logit_processor": Ban.to_str()}
