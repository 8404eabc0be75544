"""In bfloat16 on a CPU a strided answer is AR's: its logits are, bit for bit."""

import random

import pytest

from tests.bfloat16 import same_bits
from tests.server.fleet import server_fixture
from tests.server.harness import CHECKPOINT, Server, ids, prompts

pytestmark = same_bits

KINDS = [
    {"temperature": 0},
    {"temperature": 0, "frequency_penalty": 0.6, "repetition_penalty": 1.1},
    {"temperature": 1.0, "sampling_seed": 5},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "sampling_seed": -3},
]


@server_fixture
def bfloat16(logs):
    flags = ("--speculative-algorithm", "ISD", "--chunked-prefill-size", "128")
    return Server("bfloat16", CHECKPOINT, logs, *flags, env={"IDLM_MAX_STRIDE": "16"}, dtype="bfloat16")


def test_every_stride_gives_the_answers_and_logits_of_one_token_per_step(bfloat16):
    """One token per step is SGLang's own decode. Now and then the two largest logits are equal: then the first of the tokens is taken, in any batch. Contexts lie on both sides of the attention kernel's 192 and 512 columns, prompts come in chunks and from the cache."""
    rng = random.Random(7)
    asked = [*prompts(64, seed=411), *([rng.randrange(4, 1024) for _ in range(length)] for length in (150, 170, 185, 191, 300, 480, 505, 600))]
    calls = [{"prompt": p, "max_new_tokens": rng.randrange(8, 56), "ignore_eos": True, "return_logprob": True, **rng.choice(KINDS)} for p in asked]
    expected = bfloat16.many([{**c, "stride": 1} for c in calls], 2)
    order = list(range(len(calls)))
    rng.shuffle(order)
    answers = bfloat16.many([{**calls[i], "stride": rng.choice([2, 3, 4, 8, 9, 16])} for i in order], 16)
    for i, answer in zip(order, answers):
        assert ids(answer) == ids(expected[i]), calls[i]
        # The logits' bits; their logarithms are taken batch by batch, which moves the last one.
        found, wanted = ([entry[0] for entry in a["meta_info"]["output_token_logprobs"]] for a in (answer, expected[i]))
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6), calls[i]
