"""Token counts of penalised requests, and the terms that SGLang's sampler is given."""

import random
from types import SimpleNamespace

import torch
from sglang.srt.sampling.sampling_params import SamplingParams

from idlm_sglang.engine.penalties import PenalisedRows, TokenCounts, end_tokens, penalised_rows, sampler_terms
from idlm_sglang.isd.penalties import penalise

VOCAB = 20


def request(prompt=3, eos=(2,), tokenizer=None, **params):
    return SimpleNamespace(
        sampling_params=SamplingParams(**params), origin_input_ids=[1] * prompt, eos_token_ids=set(eos) if eos else None, tokenizer=tokenizer
    )


def test_counts_follow_any_sequence_of_steps_restarts_and_slot_reuse():
    rng = random.Random(0)
    counts = TokenCounts(6, VOCAB, "cpu")
    outputs: dict[int, list[int]] = {slot: [] for slot in range(1, 6)}
    for _ in range(200):
        slots = rng.sample(range(1, 6), rng.randrange(1, 5))
        if rng.random() < 0.3:
            for slot in slots:  # a new request, or one that was retracted and knows its tokens
                outputs[slot] = [rng.randrange(VOCAB) for _ in range(rng.choice([0, 0, 7]))]
            counts.restart(torch.tensor(slots), [outputs[s] for s in slots])
        else:
            tokens = torch.tensor([[rng.randrange(3) for _ in range(4)] for _ in slots])
            lens = torch.tensor([rng.randrange(1, 5) for _ in slots], dtype=torch.int32)
            counts.add(torch.tensor(slots), tokens, lens)
            for slot, row, n in zip(slots, tokens.tolist(), lens.tolist()):
                outputs[slot] += row[:n]
        for slot, output in outputs.items():
            assert counts.counts[slot].tolist() == [output.count(t) for t in range(VOCAB)], slot


def test_end_tokens_are_all_that_can_end_an_answer():
    tokenizer = SimpleNamespace(additional_stop_token_ids={4}, eos_token_id=5)
    assert end_tokens(request(stop_token_ids=[9, 7], tokenizer=tokenizer), VOCAB) == [2, 4, 5, 7, 9]
    assert end_tokens(request(eos=None), VOCAB) == []
    assert end_tokens(request(eos=(2, VOCAB)), VOCAB) == [2], "an id outside the vocabulary cannot be drawn"


def test_only_penalised_rows_are_kept():
    reqs = [request(), request(presence_penalty=0.5), request(), request(min_new_tokens=3), request(repetition_penalty=1.2)]
    rows = penalised_rows(reqs, VOCAB, "cpu")
    assert rows.rows == rows.index.tolist() == [1, 3, 4]
    assert rows.penalties.min_new.tolist() == [0, 3, 0] and rows.penalties.any_repetition
    assert penalised_rows([request(), request()], VOCAB, "cpu") is None


def test_the_sampler_gets_the_terms_of_row_0():
    """One token per step adds and scales what the strided step's first row does, and leaves other rows alone."""
    reqs = [request(), request(frequency_penalty=0.3, min_new_tokens=6), request(presence_penalty=-0.2, repetition_penalty=1.4)]
    rows = PenalisedRows(reqs, [1, 2], VOCAB, "cpu")
    counts = torch.randint(0, 3, (2, VOCAB), dtype=torch.int32)
    index = torch.tensor([5, 5])
    logits = torch.randn(3, VOCAB)
    additive, scaling = sampler_terms(rows, counts, index, 3)
    got = logits + additive
    got = torch.where(got < 0, got * scaling, got / scaling)
    assert torch.equal(got[0], logits[0])
    empty = torch.zeros(2, 0, dtype=torch.int64)
    want = penalise(logits[1:, None], rows.penalties, counts, empty, empty.bool(), index)[:, 0]
    assert torch.equal(got[1:], want)
    assert got[1, 2] == float("-inf"), "output 5 of at least 6 is no end token"
