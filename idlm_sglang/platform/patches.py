"""Patches on SGLang that the CPU platform needs. Each says what, why, its guard, and when it can go."""

import inspect

import torch

_REQ_TO_TOKEN_PARAMETERS = (
    "req_pool_indices",
    "req_to_token",
    "start_offset",
    "end_offset",
    "out_cache_loc",
    "batch_size",
)


class PatchTargetChanged(RuntimeError):
    """SGLang no longer has what a patch was written for; the version range must be looked at."""


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
    lengths = (end_offset - start_offset).long()
    rows = torch.repeat_interleave(req_pool_indices.long(), lengths, output_size=out_cache_loc.numel())
    first_token = torch.cumsum(lengths, 0) - lengths
    columns = torch.arange(out_cache_loc.numel(), device=lengths.device) + torch.repeat_interleave(
        start_offset.long() - first_token, lengths, output_size=out_cache_loc.numel()
    )
    req_to_token[rows, columns] = out_cache_loc.to(req_to_token.dtype)


def patch_assign_req_to_token() -> None:
    """What: `assign_req_to_token_pool_func` becomes torch indexing.
    Why: off SGLang's own CPU engine it launches a Triton kernel; every speculative decode step needs it.
    Guard: the function exists in `mem_cache.allocation` with the parameters replaced here.
    Goes when: SGLang consults `capabilities.supports_triton` there, as its paged allocator already does.
    """
    from sglang.srt.mem_cache import allocation

    _replace_function(allocation, "assign_req_to_token_pool_func", assign_req_to_token, _REQ_TO_TOKEN_PARAMETERS)


def _replace_function(module, name: str, replacement, parameters: tuple[str, ...]) -> None:
    current = getattr(module, name, None)
    if current is None or tuple(inspect.signature(current).parameters) != parameters:
        raise PatchTargetChanged(f"{module.__name__}.{name}{parameters} is not there as the CPU platform expects it")
    setattr(module, name, replacement)


CPU_PATCHES = [patch_assign_req_to_token]


def apply_cpu_patches() -> None:
    """Apply every patch once; calling again changes nothing. Raises PatchTargetChanged."""
    for patch in CPU_PATCHES:
        patch()
