"""The page-table write of the CPU platform against a loop."""

import torch

from idlm_sglang.platform.page_table import assign_req_to_token


def test_assign_req_to_token_writes_each_requests_columns():
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([3, 0, 10, 5, 7])
    end = torch.tensor([10, 1, 10, 40, 9])  # the third request gets nothing
    rows = torch.tensor([4, 1, 2, 5, 0])
    slots = torch.randperm(1_000, generator=generator)[: int((end - start).sum())]
    table = torch.randint(1_000, (7, 64), generator=generator, dtype=torch.int32)
    expected, used = table.clone(), 0
    for row, first, last in zip(rows.tolist(), start.tolist(), end.tolist()):
        expected[row, first:last] = slots[used : used + last - first].int()
        used += last - first
    assign_req_to_token(rows, table, start, end, slots, len(rows))
    assert torch.equal(table, expected)
