"""Tiled attention against the per-request definition, for every kind of batch the scheduler makes."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from idlm_sglang.isd import visible_rows
from idlm_sglang.platform import tile_plan, tiled_attention
from idlm_sglang.platform.tiled_attention import Workspace, attend, attend_parts
from tests.bfloat16 import same_bits
from tests.platform.reference import naive_attention, paged_batch

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
# (prefix lengths, new rows): odd lengths, both sides of a tile, of a SIMD vector and of a page.
BATCHES = {
    "decode": ([0, 1, 14, 15, 16, 63, 64, 65, 300, 511, 777], [1] * 11),
    "decode, one request": ([129], [1]),
    "verify of 7": ([0, 1, 9, 16, 57, 121, 500, 505, 512], [7] * 9),
    "verify of 15": ([3, 17, 250, 1000], [15] * 4),
    "prefill": ([0, 0, 0, 0, 0, 0], [1, 5, 127, 128, 129, 300]),
    "prefill behind a cached prefix": ([16, 1, 400, 128, 33], [16, 300, 128, 1, 77]),
    "prefill, one chunk": ([96], [32]),
    "prefill that takes a decode step along": ([0, 16, 40, 61, 300, 64], [33, 29, 7, 7, 7, 7]),
    "mixed": ([40, 300, 7, 64, 129, 500], [200, 1, 1, 1, 1, 33]),
}


@pytest.mark.parametrize("one_order", [False, True], ids=["", "one order"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("kind", BATCHES)
def test_equals_the_definition(kind, page_size, dtype, one_order):
    batch = paged_batch(*BATCHES[kind], dtype=dtype, page_size=page_size)
    error = (batch.attend(one_order=one_order).double() - naive_attention(batch)).abs().max().item()
    print(f"{kind}, pages of {page_size}: largest error {error:.1e}")
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["prefill", "mixed", "prefill that takes a decode step along", "verify of 7"])
def test_plans_for_parts_of_a_batch_equal_the_definition(kind):
    batch = paged_batch(*BATCHES[kind])
    plans = tile_plan.make_parts(batch.req_to_token, batch.req_pool_indices, batch.prefix_lens, BATCHES[kind][1], 2 * batch.k_cache[0].nbytes)
    assert len(plans) == (2 if kind in ("mixed", "prefill that takes a decode step along") else 1)
    spare = torch.cat((batch.q, batch.q[:3]))
    out = attend_parts(spare, batch.k_cache, batch.v_cache, plans, Workspace(), batch.scale)
    assert (out[: len(batch.q)].double() - naive_attention(batch)).abs().max() < TOLERANCE[torch.float32]
    assert len(out) == len(spare) and not out[len(batch.q) :].any()


def test_a_step_behind_prompts_sees_what_it_sees_alone():
    """Salvage's branch rows hide columns from each other, beside prompts of the same height, too."""
    prefix, counts = [0, 30, 40, 61], [7, 20, 7, 7]
    visible = visible_rows(torch.tensor([3, 3]), torch.tensor([1, 3]), 7)
    batch = paged_batch(prefix, counts)
    plans = tile_plan.make_parts(batch.req_to_token, batch.req_pool_indices, batch.prefix_lens, counts, 2 * batch.k_cache[0].nbytes, visible, step=len(visible))
    out = attend_parts(batch.q, batch.k_cache, batch.v_cache, plans, Workspace(), batch.scale)
    torch.testing.assert_close(out[:27], batch.attend()[:27], atol=2e-6, rtol=0)
    step = tile_plan.make_plan(batch.req_to_token, batch.req_pool_indices[2:], batch.prefix_lens[2:], 7, 2 * batch.k_cache[0].nbytes, visible)
    alone = attend(batch.q[27:], batch.k_cache, batch.v_cache, step, Workspace(), batch.scale)
    torch.testing.assert_close(out[27:], alone, atol=2e-6, rtol=0)
    assert not torch.allclose(out[27:], batch.attend()[27:])


@pytest.mark.parametrize("heads", [(8, 8, 32), (6, 2, 48), (5, 1, 16), (16, 2, 128)], ids=str)
@pytest.mark.parametrize("kind", ["decode", "verify of 7", "mixed"])
def test_grouped_heads(kind, heads):
    batch = paged_batch(*BATCHES[kind], heads=heads)
    assert (batch.attend().double() - naive_attention(batch)).abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("limit", ["SLAB_BYTES", "LONE_SLAB_BYTES", "EVEN_SLAB_BYTES", "KEPT_MASK_BYTES"])
@pytest.mark.parametrize("kind", ["decode", "verify of 7", "prefill", "mixed"])
def test_every_way_of_cutting_slabs_gives_the_same(kind, limit, monkeypatch):
    whole = paged_batch(*BATCHES[kind]).attend()
    monkeypatch.setattr(tile_plan, limit, 0)
    torch.testing.assert_close(paged_batch(*BATCHES[kind]).attend(), whole, atol=2e-6, rtol=0)


def test_small_and_large_gathers_are_the_same(monkeypatch):
    kept = paged_batch(*BATCHES["decode"]).attend()
    monkeypatch.setattr(tiled_attention, "_ALLOCATOR_REUSES", 1 << 40)
    assert torch.equal(paged_batch(*BATCHES["decode"]).attend(), kept)


@pytest.mark.parametrize("kind", ["decode", "verify of 7", "mixed"])
def test_foreign_and_dummy_slots_are_never_read(kind):
    """NaN in the dummy slot, in free slots and behind each request's end stays there."""
    batch = paged_batch(*BATCHES[kind], page_size=16)
    expected = naive_attention(batch)
    mine = torch.cat(
        [
            batch.req_to_token[row, : prefix + rows]
            for row, prefix, rows in zip(batch.req_pool_indices, batch.prefix_lens, batch.row_counts)
        ]
    ).long()
    for cache in (batch.k_cache, batch.v_cache):
        kept = cache[mine]
        cache.fill_(float("nan"))
        cache[mine] = kept
    assert (batch.attend().double() - expected).abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("rows", [1, 7])
def test_padding_requests_leave_real_rows_alone(rows):
    """A padding request points at table row 0 (slot 0, here NaN) with no prefix."""
    real = paged_batch([30, 200, 5], [rows] * 3)
    for cache in (real.k_cache, real.v_cache):
        cache[0] = float("nan")
    padded = paged_batch([30, 200, 5], [rows] * 3)
    padded.k_cache, padded.v_cache = real.k_cache, real.v_cache
    padded.req_to_token[0] = 0
    padded.req_pool_indices = torch.cat([padded.req_pool_indices, torch.tensor([0, 0])])
    padded.prefix_lens = torch.cat([padded.prefix_lens, torch.tensor([0, 0])])
    padded.row_counts = torch.cat([padded.row_counts, torch.tensor([rows, rows])])
    padded.q = torch.cat([padded.q, torch.zeros(2 * rows, *padded.q.shape[1:])])
    assert torch.equal(padded.attend()[: 3 * rows], real.attend())


def test_rows_behind_the_last_request_are_zero():
    """Token padding of an extend: requests without rows, and rows without a request."""
    batch = paged_batch([10, 0, 130], [150, 0, 3])
    plan = batch.plan()
    q = torch.cat([batch.q, torch.full((5, *batch.q.shape[1:]), float("nan"))])
    out = attend(q, batch.k_cache, batch.v_cache, plan, Workspace(), batch.scale)
    assert (out[: plan.num_rows].double() - naive_attention(batch)).abs().max() < TOLERANCE[torch.float32]
    assert torch.equal(out[plan.num_rows :], torch.zeros(5, *batch.q.shape[1:]))


@pytest.mark.parametrize("kind", ["decode", "verify of 7", "prefill behind a cached prefix", "mixed"])
def test_a_request_does_not_depend_on_its_batch_mates(kind):
    batch = paged_batch(*BATCHES[kind])
    together = batch.attend()
    pairs = [(together[batch.rows_of(i)], batch.alone(i).attend()) for i in range(len(batch.prefix_lens))]
    difference = max((a - b).abs().max().item() for a, b in pairs)
    bitwise = sum(torch.equal(a, b) for a, b in pairs)
    print(f"{kind}: largest difference {difference:.1e}, bitwise equal {bitwise}/{len(pairs)}")
    assert difference < 2e-6


@pytest.mark.parametrize("width", [3, 7, 15])
def test_verify_rows_equal_decoding_one_row_at_a_time(width):
    prefix = [0, 12, 60, 255, 500]
    batch = paged_batch(prefix, [width] * len(prefix))
    verified = batch.attend().view(len(prefix), width, *batch.q.shape[1:])
    for row in range(width):
        step = paged_batch(prefix, [1] * len(prefix))
        step.k_cache, step.v_cache, step.req_to_token = batch.k_cache, batch.v_cache, batch.req_to_token
        step.req_pool_indices = batch.req_pool_indices
        step.q = batch.q.view(len(prefix), width, *batch.q.shape[1:])[:, row].contiguous()
        step.prefix_lens = batch.prefix_lens + row
        torch.testing.assert_close(verified[:, row], step.attend(), atol=3e-6, rtol=0)


def _rows_of_other_bits(one_order: bool) -> tuple[int, int]:
    """Of random bfloat16 batches: rows that differ from the same row attended alone, and rows looked at."""
    rng = random.Random(3)
    differ = looked_at = 0
    for seed in range(48):
        size, longest = rng.choice([1, 2, 4, 8]), rng.choice([60, 190, 520, 1500])
        counts = [rng.choice([1, 3, 7, 15, 17, 31])] * size if seed % 2 else [rng.choice([1, 5, 17, 33, 129, 300]) for _ in range(size)]
        heads = rng.choice([(4, 2, 64), (8, 8, 32), (6, 2, 48), (16, 2, 128)])
        batch = paged_batch([rng.randrange(longest) for _ in counts], counts, heads=heads, dtype=torch.bfloat16, seed=seed)
        together = batch.attend(one_order=one_order)
        for request, rows in enumerate(counts):
            for row in {0, rng.randrange(rows), rows - 1}:
                alone = batch.alone(request)
                alone.q, alone.prefix_lens, alone.row_counts = alone.q[row : row + 1], alone.prefix_lens + row, torch.tensor([1])
                differ += not torch.equal(alone.attend(one_order=one_order)[0], together[batch.rows_of(request)][row])
                looked_at += 1
    return differ, looked_at


@same_bits
def test_in_bfloat16_a_row_is_the_same_bits_in_any_company():
    """Beside other rows of its request, other requests, longer ones, in slabs of any shape."""
    assert _rows_of_other_bits(one_order=True)[0] == 0
    differ, rows = _rows_of_other_bits(one_order=False)
    print(f"without one order {differ} of {rows} rows differ")
    assert differ > 0


@pytest.mark.parametrize("lone_slab_bytes", [tile_plan.LONE_SLAB_BYTES, 0])
def test_new_visible_hides_new_columns(lone_slab_bytes, monkeypatch):
    """A different mask per request; the diagonal stays, so that every row sees something."""
    monkeypatch.setattr(tile_plan, "LONE_SLAB_BYTES", lone_slab_bytes)
    prefix, width = [0, 5, 64, 300], 7
    batch = paged_batch(prefix, [width] * len(prefix))
    new_visible = torch.rand(len(prefix), width, width, generator=torch.Generator().manual_seed(1)) < 0.5
    new_visible |= torch.eye(width, dtype=torch.bool)
    hidden = batch.attend(new_visible)
    assert (hidden.double() - naive_attention(batch, new_visible)).abs().max() < TOLERANCE[torch.float32]
    assert (hidden - batch.attend()).abs().max() > 1e-2


@pytest.mark.parametrize("one_order", [False, pytest.param(True, marks=same_bits)], ids=["", "one order"])
@pytest.mark.parametrize("hides", [False, True], ids=["", "branches"])
@pytest.mark.parametrize("lone_slab_bytes", [tile_plan.LONE_SLAB_BYTES, 0])
def test_rows_that_are_left_out_are_missed_by_no_other(lone_slab_bytes, hides, one_order, monkeypatch):
    """Requests that bring the first few of a step's rows, alone and behind a prompt: each row as in the whole step."""
    monkeypatch.setattr(tile_plan, "LONE_SLAB_BYTES", lone_slab_bytes)
    prefix, lens, k = [3, 5, 64, 300], [7, 1, 4, 5], 3
    width = 2 * k + 1
    batch = paged_batch(prefix, [width] * len(prefix), dtype=torch.bfloat16 if one_order else torch.float32)
    visible = visible_rows(torch.tensor([3, 0, 2, 3]), torch.tensor([0, 0, 0, 1]), width) if hides else None
    live = (torch.arange(width) < torch.tensor(lens)[:, None]).flatten()
    whole = batch.attend(visible, one_order=one_order)[live]
    table, requests, prefixes, column = batch.req_to_token, batch.req_pool_indices, batch.prefix_lens, 2 * batch.k_cache[0].nbytes
    q = batch.q[live]

    def computed(plans):
        return attend_parts(q, batch.k_cache, batch.v_cache, plans, Workspace(), batch.scale)

    def same(found, wanted):
        return torch.equal(found, wanted) if one_order else torch.allclose(found, wanted, atol=2e-6, rtol=0)

    plan = tile_plan.make_plan(table, requests, prefixes, torch.tensor(lens), column, visible, one_order)
    assert same(computed([plan]), whole)
    parts = tile_plan.make_parts(table, requests, prefixes, lens, column, None if visible is None else visible[1:], one_order, step=3)
    # The first request is the prompt here, and sees all of its own.
    first = batch.attend(None, one_order=one_order)[:7]
    assert len(parts) == 2 and same(computed(parts), torch.cat((first, whole[7:])))


@pytest.mark.parametrize("lone_slab_bytes", [tile_plan.LONE_SLAB_BYTES, 0])
def test_a_branch_leaves_the_bits_of_a_plain_chain(lone_slab_bytes, monkeypatch):
    """What the rows of survivors compute, and so their KV in the next layer, is that of a linear step; MASK rows see a text without them."""
    monkeypatch.setattr(tile_plan, "LONE_SLAB_BYTES", lone_slab_bytes)
    prefix, k = [0, 5, 64, 300], 3
    width = 2 * k + 1
    batch = paged_batch(prefix, [width] * len(prefix))
    counts, forks = torch.tensor([3, 3, 2, 3]), torch.tensor([0, 3, 0, 1])
    visible = visible_rows(counts, forks, width)
    branch, linear = (batch.attend(mask).view(len(prefix), width, *batch.q.shape[1:]) for mask in (visible, None))
    for b, (count, fork) in enumerate(zip(counts.tolist(), forks.tolist())):
        assert torch.equal(branch[b, : count + 1], linear[b, : count + 1])
        assert (fork == count) == torch.equal(branch[b, count + 1 :], linear[b, count + 1 :])
        # The same columns without the hidden ones.
        kept = [c for c in range(prefix[b] + width) if not prefix[b] + fork < c <= prefix[b] + count]
        bare = paged_batch([prefix[b]], [width - (count - fork)])
        bare.k_cache, bare.v_cache = batch.k_cache, batch.v_cache
        bare.req_to_token[bare.req_pool_indices[0], : len(kept)] = batch.req_to_token[batch.req_pool_indices[b], kept]
        rows = torch.tensor([*range(fork + 1), *range(count + 1, width)])
        bare.q = batch.q.view(len(prefix), width, *batch.q.shape[1:])[b, rows].contiguous()
        torch.testing.assert_close(branch[b, rows], bare.attend(), atol=3e-6, rtol=0)


def test_new_visible_refuses_more_rows_than_a_tile():
    batch = paged_batch([0], [tile_plan.TILE_ROWS + 1])
    with pytest.raises(ValueError, match="new_visible needs between 1 and 128 new rows"):
        batch.plan(torch.ones(1, 129, 129, dtype=torch.bool))


class _CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lone_slab_bytes", [tile_plan.LONE_SLAB_BYTES, 0], ids=["one slab", "sorted slabs"])
@pytest.mark.parametrize("rows", [[1], [7], [40], [1, 1, 1, 200]], ids=["decode", "verify", "prefill", "mixed"])
def test_no_loop_over_requests_or_tokens(rows, lone_slab_bytes, monkeypatch):
    """The same mix of lengths costs the same number of torch operations at 4 and at 64 requests."""
    monkeypatch.setattr(tile_plan, "LONE_SLAB_BYTES", lone_slab_bytes)
    monkeypatch.setattr(tiled_attention, "_ALLOCATOR_REUSES", 0)  # the two ways to gather differ by a few views
    counts = {}
    for copies in (1, 16):
        batch = paged_batch([30, 90, 100, 20] * copies, (rows * 4)[:4] * copies, heads=(2, 1, 8))
        with _CountOperations() as operations:
            batch.attend()
        counts[4 * copies] = operations.count
    print(f"torch operations by batch size: {counts}")
    assert counts[4] == counts[64]


def test_many_lengths_need_few_slabs():
    """256 different lengths up to 4096 at a small shape: slabs follow octaves, not requests."""
    lengths = [16 * (i + 1) for i in range(256)]
    batch = paged_batch(lengths, [1] * 256, heads=(2, 1, 4))
    slabs = len(batch.plan().slabs)
    print(f"{slabs} slabs for 256 lengths")
    assert slabs <= 20
