"""MASK rows behind the prompts of a prefill batch: where they go, and which logits are read."""

from types import SimpleNamespace

import torch

from idlm_sglang.engine.warm import with_masks

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
