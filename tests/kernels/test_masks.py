"""Branch rounds on SGLang's Triton attention: the mask that is written, read by SGLang's kernel, against attention by its definition."""

import random
from types import SimpleNamespace

import pytest
import torch
from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

import idlm_kernels.masks
from idlm_sglang.engine import masks
from idlm_sglang.engine.masks import BranchMask, note_columns
from idlm_sglang.isd import visible_rows
from tests.platform.reference import naive_attention, paged_batch

CASES = 12


def rounds(seed: int):
    """Requests on scattered pages: lengths from nothing to some blocks of the kernel, any stride, any count of drafts and of survivors among them."""
    rng = random.Random(seed)
    k, page = rng.choice([1, 2, 3, 5, 7, 15]), rng.choice([1, 16])
    lengths = [rng.choice([0, 1, rng.randrange(2, 40), rng.randrange(60, 200)]) for _ in range(rng.randrange(1, 6))]
    counts = [rng.choice([k, rng.randrange(k + 1)]) for _ in lengths]
    forks = [rng.choice([0, count, rng.randrange(count + 1)]) for count in counts]
    batch = paged_batch(lengths, [2 * k + 1] * len(lengths), page_size=page, seed=seed)
    return batch, torch.tensor(counts), torch.tensor(forks), 2 * k + 1


def columns(batch, spare: int = 0) -> int:
    noted = SimpleNamespace(reqs=[SimpleNamespace(kv=SimpleNamespace(kv_allocated_len=n + spare)) for n in (batch.prefix_lens + batch.row_counts).tolist()])
    note_columns(noted)
    return noted.idlm_columns


def attend(batch, mask, device) -> torch.Tensor:
    """As the backend's TARGET_VERIFY forward calls the kernel; where each request's mask begins is counted here once more."""
    lengths, width = batch.prefix_lens.tolist(), int(batch.row_counts[0])
    taken = [batch.req_to_token[row, :n] for row, n in zip(batch.req_pool_indices, lengths)]
    new = torch.cat([batch.req_to_token[row, n : n + width] for row, n in zip(batch.req_pool_indices, lengths)]).long()
    begins, mask_begins = [0], [0]
    for n in lengths:
        begins.append(begins[-1] + n)
        mask_begins.append(mask_begins[-1] + width * (n + width))
    q, out = batch.q.to(device), torch.empty_like(batch.q, device=device)
    k_cache, v_cache = batch.k_cache.to(device), batch.v_cache.to(device)
    extend_attention_fwd(
        q, k_cache[new], v_cache[new], out, k_cache, v_cache,
        torch.arange(0, len(q) + 1, width, dtype=torch.int32, device=device), torch.tensor(begins, dtype=torch.int32, device=device),
        torch.cat(taken).long().to(device), mask, True, torch.tensor(mask_begins, device=device), width, 1.0, 1.0, batch.scale,
    )  # fmt: skip
    return out.cpu()


@pytest.mark.parametrize("written_by", [masks.hide, idlm_kernels.masks.hide])
@pytest.mark.parametrize("seed", range(CASES))
def test_rows_see_what_the_round_says_and_nothing_else(seed, written_by, device):
    batch, counts, forks, width = rounds(seed)
    visible = visible_rows(counts, forks, width)
    # What lies around the corners, of this step and of those before it, is never read.
    mask = BranchMask(device, written_by)
    spoiled = mask.write(torch.tensor([9], device=device), torch.tensor([2], device=device), torch.tensor([4000], device=device), 31, 4031)
    spoiled.fill_(seed % 2)
    written = mask.write(counts.to(device), forks.to(device), batch.prefix_lens.to(device), width, columns(batch, spare=3))
    assert written is spoiled, "the buffer is kept"
    got = attend(batch, written, device)
    assert (got - naive_attention(batch, visible)).abs().max() < 1e-5
    # Rows from which nothing is hidden have the bits of the plain causal kernel: what they verify does not depend on the mask.
    plain = attend(batch, None, device).view(len(counts), width, *got.shape[1:])
    got = got.view_as(plain)
    hiding = 0
    for b, count in enumerate(counts.tolist()):
        assert torch.equal(got[b, : count + 1], plain[b, : count + 1])
        hides = not visible[b].all()
        hiding += hides
        assert torch.equal(got[b, count + 1 :], plain[b, count + 1 :]) != hides
    print(f"lengths {batch.prefix_lens.tolist()}, {width} rows, {hiding} of {len(counts)} in a branch")


def test_a_buffer_grows_and_that_of_graphs_stays(device):
    mask = BranchMask(device)
    one = torch.tensor([1], device=device)

    def write(columns: int) -> torch.Tensor:
        return mask.write(one, one, 5 * one, 3, columns)

    first = write(8)
    assert write(9) is first and write(1000) is not first
    mask.reserve(3 * 20, 50)
    captured = mask.captured
    assert len(captured) == 110 and mask.is_captured(write(20))
    assert not mask.is_captured(write(21)) and mask.captured is captured
    assert mask.is_captured(write(8)), "a step that fits is captured again"
    # Row i of the corner: causal, 5 columns in, 8 apart.
    assert [captured[i * 8 + 5 : i * 8 + 8].tolist() for i in range(3)] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("seed", range(4))
def test_what_the_kernel_writes_is_its_definition_and_nothing_around_it(seed, device):
    rng = random.Random(seed)
    k = rng.choice([1, 3, 7])
    counts = [rng.randrange(k + 1) for _ in range(rng.choice([1, 5, 64]))]
    forks, lengths = [rng.randrange(count + 1) for count in counts], [rng.randrange(300) for _ in counts]
    width = 2 * k + 1
    parts = [torch.tensor(part) for part in (counts, forks, lengths)]
    bytes_ = width * (sum(lengths) + len(counts) * width)
    want, got = (torch.full((bytes_ + 9,), 7, dtype=torch.uint8, device=at) for at in ("cpu", device))
    idlm_kernels.masks.hide_reference(want, *parts, width)
    idlm_kernels.masks.hide(got, *(part.to(device) for part in parts), width)
    assert torch.equal(got.cpu(), want)
    masks.hide(got.fill_(7), *(part.to(device) for part in parts), width)
    assert torch.equal(got.cpu(), want)
