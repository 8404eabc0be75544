"""New KV slots into SGLang's page table: `platform.page_table.assign_req_to_token`, W columns per request.

The CPU platform's stand-in for SGLang's Triton kernel, which does it where there is a GPU: no cases there.
"""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.kernels.harness import OURS, REFERENCE, Arm, Case, Options
from benchmarks.kernels.inputs import BATCHES, STRIDES
from idlm_sglang.platform.page_table import assign_req_to_token

COLUMNS = 4096


def arms_of(batch: int, stride: int, options: Options) -> list[Arm]:
    device, width = options.device, 2 * stride - 1
    pool = torch.randperm(batch, device=device) + 1
    start = torch.randint(0, COLUMNS - width, (batch,), device=device)
    end = start + width
    slots = torch.randperm(batch * width, device=device) + 1
    tables = {name: torch.zeros(batch + 1, COLUMNS, dtype=torch.int32, device=device) for name in ("ours", "loop")}

    def ours() -> torch.Tensor:
        assign_req_to_token(pool, tables["ours"], start, end, slots, batch)
        return tables["ours"]

    def in_loops() -> torch.Tensor:
        offset = 0
        for row, first, last in zip(pool.tolist(), start.tolist(), end.tolist()):
            tables["loop"][row, first:last] = slots[offset : offset + last - first].int()
            offset += last - first
        return tables["loop"]

    return [
        Arm("ours", OURS, ours),
        Arm("loop over requests", REFERENCE, in_loops),
    ]


def cases(options: Options) -> Iterator[Case]:
    if torch.device(options.device).type != "cpu":
        return
    for batch in (1, 8) if options.quick else BATCHES:
        for stride in (4,) if options.quick else STRIDES:
            yield Case("assign", {"batch": batch, "stride": stride}, partial(arms_of, batch, stride, options))
