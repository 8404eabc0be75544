"""Drafts are valid only for the request and the length they were drawn for."""

import torch

from idlm_sglang.engine.state import SlotState
from idlm_sglang.isd.propose import Proposal

V, K = 7, 3


def proposal(batch, k=K, counts=None, fill=1, clean=None):
    g = torch.Generator().manual_seed(fill)
    drafts = torch.randint(0, V, (batch, k), generator=g)
    q = torch.rand(batch, k, V, generator=g)
    counts = torch.full((batch,), k) if counts is None else torch.tensor(counts)
    return Proposal(drafts, counts, torch.rand(batch, k, generator=g), q, counts if clean is None else torch.tensor(clean))


def make():
    return SlotState(slots=8, drafts=K, vocab=V, keep_q=True, device="cpu")


def load(state, slots, numbers, lens, limits=None, k=K):
    limits = torch.full((len(slots),), k) if limits is None else torch.tensor(limits)
    return state.load(torch.tensor(slots), torch.tensor(numbers), torch.tensor(lens), limits, k, True)


def test_what_was_stored_comes_back():
    state, p = make(), proposal(2)
    state.store(torch.tensor([5, 2]), torch.tensor([11, 12]), torch.tensor([40, 9]), p)
    back = load(state, [2, 5], [12, 11], [9, 40])
    assert back.counts.tolist() == [K, K]
    assert torch.equal(back.drafts, p.drafts[[1, 0]]) and torch.equal(back.q, p.q[[1, 0]]) and torch.equal(back.log_q, p.log_q[[1, 0]])


def test_another_request_another_length_or_an_extend_finds_no_drafts():
    state = make()
    state.store(torch.tensor([1, 2, 3, 4]), torch.tensor([11, 12, 13, 14]), torch.tensor([10, 10, 10, 10]), proposal(4))
    state.clear(torch.tensor([4]))
    back = load(state, [1, 2, 3, 4], [11, 99, 13, 14], [10, 10, 11, 10])
    assert back.counts.tolist() == [K, 0, 0, 0], "slot reuse, a longer request and a cleared slot must be cold"


def test_a_fresh_slot_has_no_drafts_even_for_number_zero_and_length_zero():
    assert load(make(), [1], [0], [0]).counts.tolist() == [0]


def test_narrowing_is_a_truncation_and_widening_keeps_what_is_there():
    state = make()
    state.store(torch.tensor([1, 2]), torch.tensor([11, 12]), torch.tensor([10, 10]), proposal(2, counts=[3, 2]))
    assert load(state, [1, 2], [11, 12], [10, 10], k=1, limits=[1, 1]).counts.tolist() == [1, 1]
    assert load(state, [1, 2], [11, 12], [10, 10], limits=[0, 3]).counts.tolist() == [0, 2]
    state.store(torch.tensor([1]), torch.tensor([11]), torch.tensor([12]), proposal(1, k=1))
    assert load(state, [1], [11], [12]).counts.tolist() == [1]


def test_survivors_stay_survivors_and_clean_drafts_clean_when_drafts_are_cut():
    """What is clean travels under the same stamp."""
    state, everyone = make(), ([1, 2, 3], [11, 12, 13], [10, 10, 10])
    state.store(*map(torch.tensor, everyone), proposal(3, counts=[3, 3, 3], clean=[0, 2, 3]))
    assert load(state, *everyone).clean.tolist() == [0, 2, 3]
    for k in (2, 1):
        back = load(state, *everyone, k=k)
        assert back.counts.tolist() == [k] * 3 and back.clean.tolist() == [0, k, k]
    assert load(state, *everyone, limits=[1, 3, 2]).clean.tolist() == [0, 2, 2]
    assert load(state, [1, 2, 3], [99, 12, 13], [10, 11, 10]).clean.tolist() == [0, 0, 3]
    state.store(*map(torch.tensor, ([1], [11], [14])), proposal(1, counts=[2]))
    assert load(state, [1], [11], [14]).clean.tolist() == [2], "a linear proposal replaces a branch"
