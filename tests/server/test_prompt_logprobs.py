"""Log-probabilities of prompts that are prefilled together, some of them retracted before the forward's results are processed."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.harness import ids, prompts


@pytest.mark.parity("logprobs")
def test_a_prompt_s_log_probabilities_are_its_own(ar, isd_rejection):
    rng = random.Random(19)
    texts = prompts(60, seed=320)
    params = {"temperature": 0, "max_new_tokens": 10, "ignore_eos": True}
    asked = [rng.sample(texts, rng.randrange(2, 6)) for _ in range(80)]

    def prompt_logprobs(server, several):
        body = {"text": several, "sampling_params": params, "return_logprob": True, "logprob_start_len": 0}
        return [(ids(a), [x[0] for x in a["meta_info"]["input_token_logprobs"]]) for a in server.post("/generate", body).json()]

    with ThreadPoolExecutor(8) as threads:
        known = dict(zip(texts, threads.map(lambda text: prompt_logprobs(ar, [text])[0], texts)))
        answers = list(threads.map(lambda several: prompt_logprobs(isd_rejection, several), asked))
    for several, found in zip(asked, answers):
        for text, (tokens, logprobs) in zip(several, found):
            assert tokens == known[text][0]
            assert logprobs[0] is None and logprobs[1:] == pytest.approx(known[text][1][1:], abs=1e-4), text
