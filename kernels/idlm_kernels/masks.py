"""The mask of a branch round for SGLang's Triton attention, in one launch: one program per request.

What is written and where: `idlm_sglang.engine.masks`.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _hide(buffer, size, counts, forks, lengths, width, BATCH: tl.constexpr, ROWS: tl.constexpr):
    request = tl.program_id(0)
    other = tl.arange(0, BATCH)
    in_front = other < request
    columns_in_front = tl.sum(tl.where(in_front, tl.load(lengths + other, mask=in_front, other=0).to(tl.int64) + width, 0))
    length = tl.load(lengths + request).to(tl.int64)
    count = tl.load(counts + request).to(tl.int64)
    fork = tl.load(forks + request).to(tl.int64)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, ROWS)[None, :]
    survivor = (column > fork) & (column <= count)
    sees = (column <= row) & ~((row > count) & survivor)
    place = width * columns_in_front + row * (length + width) + length + column
    # A length that is wrong must not write into another's memory.
    tl.store(buffer + place, sees.to(tl.uint8), mask=(row < width) & (column < width) & (place < size))


def hide(buffer: torch.Tensor, counts: torch.Tensor, forks: torch.Tensor, lengths: torch.Tensor, width: int) -> None:
    """Write the W x W corner of each request's mask into ``buffer`` ``(bytes,)`` uint8, in place; the rest of it is left as it is.

    Args:
        counts, forks: ``(B,)`` integer, drafts of a step, and those that its MASK rows see.
        lengths: ``(B,)`` integer, committed columns.
        width: W.
    """
    batch = len(counts)
    if batch:
        counts, forks, lengths = counts.contiguous(), forks.contiguous(), lengths.contiguous()
        _hide[(batch,)](
            buffer, len(buffer), counts, forks, lengths, width, BATCH=triton.next_power_of_2(batch), ROWS=triton.next_power_of_2(width), num_warps=1
        )


def hide_reference(buffer: torch.Tensor, counts: torch.Tensor, forks: torch.Tensor, lengths: torch.Tensor, width: int) -> None:
    """:func:`hide` by loops on the host."""
    start = 0
    for count, fork, length in zip(counts.tolist(), forks.tolist(), lengths.tolist(), strict=True):
        for row in range(width):
            for column in range(width):
                hidden = row > count and fork < column <= count
                buffer[start + row * (length + width) + length + column] = int(column <= row and not hidden)
        start += width * (length + width)
