"""Rows behind the prompts of a prefill batch, MASK rows and a decode step's: where they go, and which logits are read."""

from types import SimpleNamespace

import pytest
import torch

from idlm_sglang.engine.beside import with_step
from idlm_sglang.engine.ragged import RaggedRows
from idlm_sglang.engine.requests import STRIDED
from idlm_sglang.engine.warm import _takes_masks, drafts_for, with_masks

MASK = 99


def test_masks_stand_behind_their_prompts_and_the_batch_is_left_alone():
    lens = [3, 2, 4]  # the second row's prompt goes on in a later chunk
    prefix = torch.tensor([0, 5, 7])
    table = torch.arange(4 * 32, dtype=torch.int32).view(4, 32)
    slots = torch.tensor([2, 1, 3])
    batch = SimpleNamespace(
        reqs=[None] * 3,
        device="cpu",
        input_ids=torch.arange(10, 19),
        extend_lens=list(lens),
        extend_num_tokens=9,
        req_pool_indices=slots,
        seq_lens=prefix + torch.tensor(lens),
        seq_lens_cpu=prefix + torch.tensor(lens),
        seq_lens_sum=21,
        out_cache_loc=torch.cat([table[s, p : p + n] for s, p, n in zip(slots, prefix, lens)]).long(),
    )
    before = {k: v.clone() if torch.is_tensor(v) else v for k, v in vars(batch).items()}

    longer, read = with_masks(batch, [0, 2], 2, MASK, table)

    assert longer.input_ids.tolist() == [10, 11, 12, MASK, MASK, 13, 14, 15, 16, 17, 18, MASK, MASK]
    assert longer.extend_lens == [5, 2, 6] and longer.extend_num_tokens == 13
    assert longer.seq_lens.tolist() == longer.seq_lens_cpu.tolist() == [5, 7, 13] and longer.seq_lens_sum is None
    # Every row writes its KV where the page table says that its position is.
    expected = [table[s, p : p + n] for s, p, n in zip(slots, prefix, longer.extend_lens)]
    assert torch.equal(longer.out_cache_loc, torch.cat(expected).long())
    assert read == [2, 6, 10, 3, 4, 11, 12]
    assert [longer.input_ids[i].item() for i in read] == [12, 14, 18, MASK, MASK, MASK, MASK]
    for name, value in before.items():
        now = getattr(batch, name)
        assert torch.equal(now, value) if torch.is_tensor(value) else now == value, name


def test_no_more_masks_than_the_longest_answer_can_use():
    """Prompts of 4 and 9 columns, of which the prefill computes some: the token of the prefill itself, and the one behind the drafts, need none."""
    batch = SimpleNamespace(prefix_lens=[1, 0], extend_lens=[3, 9])

    def drafts(first: int, second: int, limits=(7, 7), masked=(0, 1)) -> int:
        return drafts_for(batch, list(masked), SimpleNamespace(limits_host=limits, ends=[4 + first, 9 + second]))

    assert drafts(2, 2) == 0 and drafts(3, 2) == 1 and drafts(3, 8) == 6
    assert drafts(100, 3) == 7 and drafts(100, 3, masked=[1]) == 1 and drafts(100, 3, masked=[]) == 0
    assert drafts(100, 100, (3, 3)) == 3 and drafts(100, 4, (1, 7)) == 2 and drafts(100, 100, (0, 0)) == 0, "nobody's own stride is exceeded"


@pytest.mark.parametrize("left, takes", [(1, False), (2, False), (3, True), (50, True)])
def test_masks_are_for_answers_that_can_use_a_draft(left, takes):
    """Also when a request comes back from a retraction with the tokens that it had."""
    for output in (0, 6):
        params, plan = SimpleNamespace(max_new_tokens=output + left), SimpleNamespace(mode=STRIDED)
        req = SimpleNamespace(idlm_plan=plan, sampling_params=params, session=None, origin_input_ids=[1] * 9)
        req.full_untruncated_fill_ids = [1] * (9 + output)
        req.extend_end = 9 + output
        assert _takes_masks(req) is takes
        req.extend_end -= 1
        assert not _takes_masks(req), "the prompt goes on in a later chunk"


def test_a_decode_steps_rows_extend_their_own_columns_behind_the_prompts():
    """Also where requests bring different numbers of rows: the first ones of theirs."""
    table = torch.arange(5 * 32, dtype=torch.int32).view(5, 32)
    batch = SimpleNamespace(
        input_ids=torch.arange(10, 13, dtype=torch.int32),
        extend_lens=[3],
        extend_num_tokens=3,
        prefix_lens=[4],
        extend_logprob_start_lens=[3],
        req_pool_indices=torch.tensor([2]),
        req_pool_indices_cpu=torch.tensor([2], dtype=torch.int32),
        seq_lens=torch.tensor([7]),
        seq_lens_cpu=torch.tensor([7]),
        orig_seq_lens=torch.tensor([7], dtype=torch.int32),
        seq_lens_sum=7,
        multimodal_inputs=[None],
        out_cache_loc=table[2, 4:7].long(),
    )
    lengths, slots = torch.tensor([9, 20]), torch.tensor([1, 4])
    ragged = RaggedRows.of(torch.tensor([1, 0]), torch.tensor([1, 1]), 3)
    assert ragged.lens == [3, 2]
    tokens, places = torch.tensor([[5, 6, MASK], [7, MASK, MASK]]), table[slots[:, None], lengths[:, None] + torch.arange(3)].long()
    step = SimpleNamespace(tokens=tokens, places=places, lens=ragged.lens, flat=ragged.pick)

    partner = SimpleNamespace(seq_lens=lengths, seq_lens_cpu=lengths, req_pool_indices=slots, req_pool_indices_cpu=slots)
    with_step(batch, step, partner)

    assert batch.input_ids.tolist() == [10, 11, 12, 5, 6, MASK, 7, MASK] and batch.input_ids.dtype == torch.int32
    assert batch.extend_lens == [3, 3, 2] and batch.prefix_lens == [4, 9, 20] and batch.extend_num_tokens == 8
    assert batch.seq_lens.tolist() == batch.seq_lens_cpu.tolist() == batch.orig_seq_lens.tolist() == [7, 12, 22]
    assert batch.req_pool_indices.tolist() == batch.req_pool_indices_cpu.tolist() == [2, 1, 4]
    expected = [table[s, p : p + n] for s, p, n in zip(batch.req_pool_indices, batch.prefix_lens, batch.extend_lens)]
    assert torch.equal(batch.out_cache_loc, torch.cat(expected).long())
