"""Sampled answers under penalties, biases and grammars, in batches full of other requests: AR's distribution."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.harness import chat, ids
from tests.server.parity.cases import GENERATE, MESSAGES, tokenizer
from tests.server.parity.compare import ask, near
from tests.server.test_sampling import BOUND, PROMPT, check

SAMPLES = 1500
SETTINGS = {
    "penalties and bias": ({"temperature": 1.0, "frequency_penalty": 0.9, "repetition_penalty": 1.3, "logit_bias": {"17": -3.0, "15": 2.0}}, ("sampling", "penalties", "logit_bias")),
    "a grammar": ({"temperature": 1.3, "top_p": 0.97, "regex": "( [A-Za-z]+[.,]?){2,9}", "ignore_eos": False}, ("sampling", "grammar")),
    "min_new_tokens, top-k and min-p": ({"temperature": 1.4, "top_k": 12, "min_p": 0.02, "min_new_tokens": 4, "ignore_eos": False}, ("sampling", "penalties")),
}  # fmt: skip


def draw(server, params, mates):
    """Answers of five tokens, one case of the mix for every 25 of them, a few at a time beside them."""
    call = {"prompt": PROMPT, "max_new_tokens": 5, "ignore_eos": True, "stride": 4, **params}
    with ThreadPoolExecutor(3) as pool:
        beside = [pool.submit(ask, server, mates[i % len(mates)]) for i in range(SAMPLES // 25)]
        answers = server.batches([call] * SAMPLES)
        for job in beside:
            job.result()
    # An answer may end early; what is missing is a value of its own.
    return [tuple((ids(answer) + [-1] * 5)[:5]) for answer in answers]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.parity(*keys)) for name, (_, keys) in SETTINGS.items()])
def test_the_distribution_is_that_of_ar(ar, isd, mix, name):
    mates = [case for case in mix if case.path in (GENERATE, MESSAGES)]
    params = SETTINGS[name][0]
    before = isd.metrics()
    want, got = draw(ar, params, mates), draw(isd, params, mates)
    after = isd.metrics()
    accepted = sum(after[k] - before.get(k, 0) for k in after if k.startswith("idlm:drafts_accepted"))
    assert accepted > SAMPLES / 4, "hardly a draft was accepted: the test would show nothing"
    assert check(want, got, name) > BOUND


@pytest.mark.parity("logprobs", "sampling")
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_logprobs_of_sampled_tokens_are_those_ar_gives_them(ar, isd, stride):
    """AR reads prompt and sampled answer as one prompt, and must find every token as probable as ISD said."""
    prompts = [tokenizer().encode(p).ids for p in (chat("What is I-DLM?"), chat("Tell me a story about Tavo."), PROMPT)] * 4
    calls = [{"prompt": p, "temperature": 1.0, "max_new_tokens": 30, "return_logprob": True, "stride": stride} for p in prompts]
    for prompt, answer in zip(prompts, isd.many(calls, 12)):
        body = {"input_ids": prompt + ids(answer), "return_logprob": True, "logprob_start_len": 0, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        read = ar.post("/generate", body).json()["meta_info"]["input_token_logprobs"][len(prompt) :]
        assert [token for _, token, _ in read] == ids(answer)
        said = answer["meta_info"]["output_token_logprobs"]
        assert all(near(a[0], b[0]) for a, b in zip(read, said, strict=True)), (read, said)
