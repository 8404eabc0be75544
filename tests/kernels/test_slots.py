"""Step inputs and kept drafts by slot: equal to the plain-torch layout and state, stamps included."""

import pytest
import torch

from idlm_kernels import slots
from idlm_sglang.engine.state import SlotState
from idlm_sglang.isd import row_offsets, step_positions, step_tokens

MASK = 3


KEPT = ("drafts", "counts", "clean_counts", "log_q", "numbers", "lengths")


def state_of(device, count=9, drafts=3) -> SlotState:
    random = torch.Generator().manual_seed(0)
    state = SlotState(count, drafts, 99, False, device)
    state.drafts.copy_(torch.randint(4, 99, (count, drafts), generator=random))
    state.counts.copy_(torch.tensor([0, 3, 3, 2, 1, 3, 3, 0, 2]))
    state.clean_counts.copy_(torch.tensor([0, 3, 0, 2, 1, 0, 3, 0, 2]))
    state.log_q.copy_(torch.randn(count, drafts, generator=random))
    state.numbers.copy_(torch.arange(count) + 40)
    state.lengths.copy_(torch.arange(count) * 5)
    return state


def batch_of(device):
    """Slots in any order; the third request is new in its slot, the fourth has moved on, the fifth may carry one draft, the last none."""
    at = torch.tensor([5, 1, 6, 2, 3, 8])
    numbers, seq_lens = at + 40, (at * 5).int()
    numbers[2] += 1
    seq_lens[3] += 1
    limits = torch.tensor([3, 3, 3, 3, 1, 0])
    pending = torch.arange(6) + 50
    table = torch.randint(0, 1000, (9, 44), generator=torch.Generator().manual_seed(1)).int()
    return [part.to(device) for part in (at, numbers, seq_lens, limits, pending, table)]


@pytest.mark.parametrize("k, branch", [(1, False), (2, True), (3, False), (3, True)])
def test_inputs_are_those_of_layout_state_and_page_table(k, branch, device):
    state = state_of(device)
    at, numbers, seq_lens, limits, pending, table = batch_of(device)
    arguments = (state, at, numbers, seq_lens, limits, pending, k, table, MASK, 41, branch)
    got, want = slots.load(*arguments), slots.load_reference(*arguments)
    for name in vars(want):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert got.counts.tolist() == [min(k, c) for c in (3, 3, 0, 0, 1, 0)]
    carried = state.load(at, numbers, seq_lens, limits, k, False)
    for name in ("drafts", "counts", "log_q", "clean"):
        assert torch.equal(getattr(got, name), getattr(carried, name)), name
    assert torch.equal(got.tokens, step_tokens(pending, got.drafts, got.counts, MASK))
    width, seen = 2 * k + 1, got.clean if branch else got.counts
    assert torch.equal(got.forks, seen) and torch.equal(got.positions, seq_lens.long()[:, None] + row_offsets(got.counts, seen, width))
    at_columns = step_positions(seq_lens, width)
    inside = at_columns < table.shape[1]
    assert torch.equal(got.kv_slots[inside], table[at[:, None], at_columns.clamp(max=43)].long()[inside]) and int(got.rotary.max()) == 41
    assert (got.kv_slots[5] == 0).sum() >= (40 + 2 * k + 1) - 44


def test_what_is_stored_comes_back_to_the_same_request_at_its_new_length_only(device):
    """Drafts of a step, and of none: as in plain torch, with the step's figures."""
    state, plain = state_of(device), state_of(device)
    at, numbers, seq_lens, limits, pending, table = batch_of(device)
    random = torch.Generator().manual_seed(2)
    drafts, log_q = torch.randint(4, 99, (6, 2), generator=random).to(device), torch.randn(6, 2, generator=random).to(device)
    counts, accept_lens = torch.tensor([2, 0, 2, 1, 2, 2], device=device), torch.tensor([1, 3, 2, 1, 1, 2], dtype=torch.int32, device=device)
    verified = slots.Round(counts.flip(0), counts.flip(0) // 2, accept_lens, torch.rand(6, generator=random).to(device))
    for of in (None, verified):
        arguments = (at, numbers, seq_lens, drafts, counts, counts // 2, log_q, of)
        (lengths, figures), (want_lengths, want_figures) = slots.store(state, *arguments), slots.store_reference(plain, *arguments)
        for name in KEPT:
            assert torch.equal(getattr(state, name), getattr(plain, name)), name
        assert torch.equal(lengths, want_lengths) and lengths.dtype == seq_lens.dtype
        assert figures is want_figures is None if of is None else torch.equal(figures, want_figures)
    many = torch.full((6,), 3, device=device)
    again = lambda numbers, lengths: slots.load(state, at, numbers, lengths, many, pending, 2, table, MASK, 41)
    back = again(numbers, seq_lens + accept_lens)
    assert torch.equal(back.counts, counts) and torch.equal(back.clean, counts // 2) and torch.equal(back.drafts, drafts) and torch.equal(back.log_q, log_q)
    assert not again(numbers, seq_lens).counts.any() and not again(numbers + 1, seq_lens + accept_lens).counts.any()


def test_more_drafts_than_a_slot_keeps_are_refused(device):
    at, numbers, seq_lens, limits, pending, table = batch_of(device)
    with pytest.raises(ValueError, match="4 drafts of slots that keep 3"):
        slots.load(state_of(device), at, numbers, seq_lens, limits, pending, 4, table, MASK, 41)


def test_inputs_that_do_not_lie_side_by_side_are_read_where_they_lie(device):
    """SGLang's page table may be part of a larger one, and numbers a column of a table."""
    state, (at, numbers, seq_lens, limits, pending, table) = state_of(device), batch_of(device)
    want = slots.load_reference(state, at, numbers, seq_lens, limits, pending, 3, table, MASK, 41)
    part = torch.cat((table, table + 7), dim=1)[:, : table.shape[1]]
    at, numbers, seq_lens, limits, pending = (column[:, None].expand(-1, 2).contiguous()[:, 0] for column in (at, numbers, seq_lens, limits, pending))
    got = slots.load(state, at, numbers, seq_lens, limits, pending, 3, part, MASK, 41)
    for name in vars(want):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
