"""Prompts that are embeddings, beside text and behind retractions."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from tests.server.harness import CHECKPOINT, Server, ids, prompts
from tests.server.parity.cases import tokenizer

RETRACTED = re.compile(r"#retracted_reqs: ([1-9])")


@cache
def table() -> torch.Tensor:
    """``(V, D)`` of the embedded checkpoint."""
    return load_file(CHECKPOINT + "/model.safetensors")["model.embed_tokens.weight"].float()


def embedded(tokens: list[int], stream: bool = False, **params) -> dict:
    """A request whose prompt is the embeddings of ``tokens``: its answer is theirs."""
    return {"input_embeds": table()[torch.tensor(tokens)].tolist(), "stream": stream, "sampling_params": params, "return_logprob": True}


def answered(server: Server, body: dict) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities, of the increments where the answer is streamed."""
    with server.post("/generate", body, stream=body["stream"]) as reply:
        assert reply.status_code == 200, reply.text
        if body["stream"]:
            events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith(b"data: {")]
        else:
            events = [reply.json()]
    pairs = [pair for event in events for pair in event["meta_info"]["output_token_logprobs"]]
    tokens = [token for event in events for token in event["output_ids"]]
    assert tokens == [token for _, token, _ in pairs]
    return tokens, [logprob for logprob, _, _ in pairs]


def given(server: Server, prompt: list[int], answer: list[int]) -> list[float]:
    """The log-probabilities that a server gives the tokens of an answer to a prompt."""
    body = {"input_ids": prompt + answer, "sampling_params": {"max_new_tokens": 1}, "return_logprob": True, "logprob_start_len": len(prompt) - 1}
    found = server.post("/generate", body).json()["meta_info"]["input_token_logprobs"][-len(answer) :]
    # SGLang tells the last token of a vocabulary as 0.
    assert [token for _, token, _ in found] == [token if token < len(table()) - 1 else 0 for token in answer]
    return [logprob for logprob, _, _ in found]


def check_unseeded(server: Server, scorer: Server, count: int, **params) -> int:
    """Answers at temperature 1 and no seed, half of them streamed: what was sent is one answer, each token drawn behind those before it. How often requests were retracted."""
    tokens = [tokenizer().encode(text).ids for text in prompts(count, seed=83)]
    before = len(RETRACTED.findall(server.log.read_text(errors="replace")))
    bodies = [embedded(prompt, stream=i % 2 == 0, temperature=1.0, **{"max_new_tokens": 48, "ignore_eos": True, **params}) for i, prompt in enumerate(tokens)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: answered(server, body), bodies))
    for prompt, (answer, logprobs) in zip(tokens, answers):
        assert logprobs == pytest.approx(given(scorer, prompt, answer), abs=2e-3), (prompt, answer)
    return len(RETRACTED.findall(server.log.read_text(errors="replace"))) - before


def test_embeddings_and_text_at_a_time_get_what_ar_gives_the_tokens(ar, isd_rejection):
    tokens = [tokenizer().encode(text).ids for text in prompts(24, seed=81)]
    params = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
    want = ar.many([{"prompt": prompt, **params} for prompt in tokens], 12)

    def ask(i: int) -> list[int]:
        if i % 3 == 0:
            return ids(isd_rejection.generate(tokens[i], **params))
        return answered(isd_rejection, embedded(tokens[i], stream=i % 3 == 1, **params))[0]

    with ThreadPoolExecutor(12) as pool:
        got = list(pool.map(ask, range(len(tokens))))
    assert got == [ids(answer) for answer in want]


def test_an_unseeded_answer_to_embeddings_is_one_answer_behind_retractions(ar, isd_rejection):
    retracted = check_unseeded(isd_rejection, ar, 24)
    print(f"24 unseeded answers, {retracted} times requests were retracted")
    assert retracted > 0


@pytest.mark.parametrize("embeds", [[[0.0] * 3] * 2, [[0.0] * 256, [0.0] * 255], [[1e39] * 256]])
def test_embeddings_that_do_not_fit_are_a_400_that_names_them(isd_rejection, embeds):
    reply = isd_rejection.post("/generate", {"input_embeds": embeds, "sampling_params": {"max_new_tokens": 2}})
    assert reply.status_code == 400 and "of input_embeds has " in reply.text, reply.text
