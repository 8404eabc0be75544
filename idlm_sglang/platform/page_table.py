"""Writes to SGLang's page table (`req_to_token`) in plain torch."""

import torch

# Up to this many requests a loop over slices takes less time than the batched indexing.
_FEW = 4


def assign_req_to_token(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Write new KV slots into columns [start_offset, end_offset) of each request's page-table row, in place.

    req_pool_indices, start_offset, end_offset: (batch_size,) int; req_to_token: (slots, columns) int32;
    out_cache_loc: (sum(end - start),) int, request after request.
    """
    if batch_size <= _FEW:
        taken = 0
        for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
            req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start]
            taken += end - start
        return
    lengths = (end_offset - start_offset).long()
    rows = torch.repeat_interleave(req_pool_indices.long(), lengths, output_size=out_cache_loc.numel())
    first_token = torch.cumsum(lengths, 0) - lengths
    columns = torch.arange(out_cache_loc.numel(), device=lengths.device) + torch.repeat_interleave(
        start_offset.long() - first_token, lengths, output_size=out_cache_loc.numel()
    )
    req_to_token[rows, columns] = out_cache_loc.to(req_to_token.dtype)
