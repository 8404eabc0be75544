"""The rows of a step: what stands where, and which position each row has."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_sglang.isd.layout import drafts_in_front, mask_rows, row_offsets, step_positions, step_tokens, visible_rows

MASK = 99


def test_rows_are_pending_then_valid_drafts_then_masks():
    drafts = torch.tensor([[11, 12, 13], [21, 22, 23], [31, 32, 33], [41, 42, 43]])
    tokens = step_tokens(torch.tensor([1, 2, 3, 4]), drafts, torch.tensor([0, 1, 2, 3]), MASK)
    assert tokens.tolist() == [
        [1, MASK, MASK, MASK, MASK, MASK, MASK],
        [2, 21, MASK, MASK, MASK, MASK, MASK],
        [3, 31, 32, MASK, MASK, MASK, MASK],
        [4, 41, 42, 43, MASK, MASK, MASK],
    ]
    assert tokens.dtype == torch.int64


def test_positions_follow_the_cached_tokens_without_a_gap():
    positions = step_positions(torch.tensor([0, 7, 40_000], dtype=torch.int32), 5)
    assert positions.tolist() == [[0, 1, 2, 3, 4], [7, 8, 9, 10, 11], [40_000, 40_001, 40_002, 40_003, 40_004]]
    assert positions.dtype == torch.int64


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 6), st.lists(st.integers(0, 6), min_size=1, max_size=5), st.sampled_from([torch.int32, torch.int64])
)
def test_proposing_rows_are_the_k_masks_behind_the_drafts(k, counts, dtype):
    """They hold MASK, see every valid draft and no row between, and lie inside the step's width."""
    counts = torch.tensor(counts).clamp(max=k).to(dtype)
    drafts = torch.arange(len(counts) * k).view(len(counts), k)
    tokens = step_tokens(torch.full((len(counts),), 77), drafts, counts, MASK)
    rows = mask_rows(counts, k)
    assert tokens.shape == (len(counts), 2 * k + 1) and rows.shape == (len(counts), k) and rows.dtype == torch.int64
    for line, count in enumerate(counts.tolist()):
        assert rows[line].tolist() == list(range(count + 1, count + k + 1))
        assert tokens[line, : count + 1].tolist() == [77] + drafts[line, :count].tolist()
        assert set(tokens[line, count + 1 :].tolist()) <= {MASK}


def test_a_drafts_mask_row_and_verifying_row_have_the_same_position():
    """Draft j of a step with c drafts came from MASK row c + j; all accepted, row j - 1 of the next step verifies it."""
    for k in range(1, 5):
        counts = torch.arange(k + 1)
        seq_lens = torch.full((k + 1,), 10)
        drawn_at = step_positions(seq_lens, 2 * k + 1).gather(1, mask_rows(counts, k))
        verified_at = step_positions(seq_lens + counts + 1, 2 * k + 1)[:, :k]
        assert torch.equal(drawn_at, verified_at)


def test_every_row_of_a_branch_sees_a_text_without_a_gap_up_to_its_own_position():
    """For every count and fork: what a row sees stands at positions 0, 1, .. up to its own, each once."""
    for k in range(1, 5):
        width = 2 * k + 1
        for count in range(k + 1):
            for fork in range(count + 1):
                c, f = torch.tensor([count]), torch.tensor([fork])
                offsets, visible = row_offsets(c, f, width)[0], visible_rows(c, f, width)[0].tril()
                for i in range(width):
                    assert offsets[visible[i]].tolist() == list(range(int(offsets[i]) + 1))
                assert offsets[: count + 1].tolist() == list(range(count + 1)), "drafts stand where a linear step has them"
                assert offsets[mask_rows(c, k)[0]].tolist() == list(range(fork + 1, fork + k + 1))
                assert torch.equal(drafts_in_front(c, f, k, width)[0], visible[:, 1 : k + 1] & (torch.arange(1, k + 1) <= count) & (torch.arange(width)[:, None] >= torch.arange(1, k + 1)))
                assert visible.equal(torch.ones_like(visible).tril()) == (fork == count)


def test_stride_one_is_a_single_row():
    empty = torch.zeros(2, 0, dtype=torch.int64)
    assert step_tokens(torch.tensor([5, 6]), empty, torch.tensor([0, 0]), MASK).tolist() == [[5], [6]]
    assert mask_rows(torch.tensor([0, 0]), 0).shape == (2, 0)
