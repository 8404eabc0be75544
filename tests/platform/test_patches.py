"""Patches of the CPU platform: right, applied once, and loud when SGLang changes underneath."""

import pytest
import torch
from sglang.srt.mem_cache import allocation

from idlm_sglang.platform import patches


@pytest.fixture(autouse=True)
def stock_allocation(monkeypatch):
    """Whatever a test patches is undone."""
    monkeypatch.setattr(allocation, "assign_req_to_token_pool_func", allocation.assign_req_to_token_pool_func)


def test_assign_req_to_token_writes_each_requests_columns():
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([3, 0, 10, 5])
    end = torch.tensor([10, 1, 10, 40])  # the third request gets nothing
    rows = torch.tensor([4, 1, 2, 5])
    slots = torch.randperm(1_000, generator=generator)[: int((end - start).sum())]
    table = torch.randint(1_000, (7, 64), generator=generator, dtype=torch.int32)
    expected, used = table.clone(), 0
    for row, first, last in zip(rows.tolist(), start.tolist(), end.tolist()):
        expected[row, first:last] = slots[used : used + last - first].int()
        used += last - first
    patches.assign_req_to_token(rows, table, start, end, slots, 4)
    assert torch.equal(table, expected)


def test_applying_twice_changes_nothing():
    patches.apply_cpu_patches()
    first = allocation.assign_req_to_token_pool_func
    patches.apply_cpu_patches()
    assert first is patches.assign_req_to_token is allocation.assign_req_to_token_pool_func


def test_a_changed_signature_is_an_error(monkeypatch):
    monkeypatch.setattr(allocation, "assign_req_to_token_pool_func", lambda batch: None)
    with pytest.raises(patches.PatchTargetChanged, match="allocation.assign_req_to_token_pool_func"):
        patches.apply_cpu_patches()


def test_a_missing_function_is_an_error(monkeypatch):
    monkeypatch.delattr(allocation, "assign_req_to_token_pool_func")
    with pytest.raises(patches.PatchTargetChanged, match="allocation.assign_req_to_token_pool_func"):
        patches.apply_cpu_patches()
