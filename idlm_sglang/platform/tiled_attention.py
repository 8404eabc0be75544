"""Causal attention of a ragged batch over a paged KV cache, in plain torch, without a loop over requests.

One code path serves prefill, decode, verify and mixed batches. A request's new rows are cut into *tiles* of at
most TILE_ROWS query rows. A tile sees the columns 0 .. its last row's position, so the triangle above the diagonal
costs at most one tile. Tiles of similar shape are padded to a common shape and computed together as a *slab*: one
gather of K, one of V and one `scaled_dot_product_attention` call. The number of slabs grows with the spread of the
lengths (logarithmically) and with the bytes gathered, not with the number of requests.

The query heads of a KV head are folded into the rows, so K and V are never repeated for grouped-query attention.
"""

from itertools import accumulate

import torch
from torch.nn.functional import scaled_dot_product_attention

from idlm_sglang.platform.tile_plan import Plan


# Elements below which the C allocator hands out recycled memory anyway, and faster than a kept buffer is found.
_ALLOCATOR_REUSES = 16_384


class Workspace:
    """Grow-only buffers for gathered K and V: fresh ones would be paged in by the kernel on every layer."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def gather(self, side: str, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """(n, heads * dim): the rows `slots` (n,) of `cache` (total slots, heads, dim).

        Valid until the next call with the same `side`.
        """
        row = cache.shape[1] * cache.shape[2]
        size = slots.shape[0] * row
        if size <= _ALLOCATOR_REUSES:
            return cache.view(-1, row).index_select(0, slots)
        buffer = self._buffers.get(side)
        if buffer is None or buffer.shape[0] < size or buffer.dtype != cache.dtype:
            # Written inside and outside inference mode alike, so it must not be an inference tensor.
            with torch.inference_mode(False):
                buffer = self._buffers[side] = torch.empty(size, dtype=cache.dtype, device=cache.device)
        return torch.index_select(cache.view(-1, row), 0, slots, out=buffer[:size].view(-1, row))


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: Plan,
    workspace: Workspace,
    scale: float,
) -> torch.Tensor:
    """Attention output (rows, q heads, dim) of q (rows, q heads, dim) over one layer's KV cache.

    k_cache, v_cache: (slots, kv heads, dim), the new rows' K and V already written; q heads is a multiple of kv
    heads. Rows behind the plan's last row (batch padding) come back as zeros.
    """
    num_tokens = q.shape[0]
    if plan.is_whole_batch:
        out = _attend_slab(q[: plan.num_rows], k_cache, v_cache, plan, 0, workspace, scale)
        return out if num_tokens == plan.num_rows else torch.cat((out, out.new_zeros(num_tokens - plan.num_rows, *out.shape[1:])))
    # One spare row behind the last takes what the slabs' padding rows produce.
    out = q.new_empty(num_tokens + 1, *q.shape[1:])
    for index, slab in enumerate(plan.slabs):
        rows = q.index_select(0, slab.q_rows)
        out.index_copy_(0, slab.out_rows, _attend_slab(rows, k_cache, v_cache, plan, index, workspace, scale))
    out[plan.num_rows :] = 0
    return out[:num_tokens]


def attend_parts(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plans: list[Plan], workspace: Workspace, scale: float
) -> torch.Tensor:
    """:func:`attend` of consecutive rows of q, each plan's behind those of the plan before it."""
    if len(plans) == 1:
        return attend(q, k_cache, v_cache, plans[0], workspace, scale)
    ends = list(accumulate((plan.num_rows for plan in plans), initial=0))
    ends[-1] = q.shape[0]  # batch padding behind the last plan's rows
    parts = zip(plans, ends, ends[1:])
    return torch.cat([attend(q[start:end], k_cache, v_cache, plan, workspace, scale) for plan, start, end in parts])


def _attend_slab(
    rows: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: Plan,
    index: int,
    workspace: Workspace,
    scale: float,
) -> torch.Tensor:
    """(tiles * height, q heads, dim) -> the same shape."""
    slab = plan.slabs[index]
    _, q_heads, dim = rows.shape
    kv_heads = k_cache.shape[1]
    group = q_heads // kv_heads
    columns = (slab.tiles, slab.width, kv_heads, dim)
    k = workspace.gather("k", k_cache, slab.slots).view(columns).transpose(1, 2)
    v = workspace.gather("v", v_cache, slab.slots).view(columns).transpose(1, 2)
    if k.dtype != rows.dtype:
        k, v = k.to(rows.dtype), v.to(rows.dtype)
    mask = plan.mask(index, group, rows.dtype)
    if slab.height == 1:
        # Folding one row is a view; small decode batches notice every operation less.
        folded = rows.view(slab.tiles, kv_heads, group, dim)
    else:
        folded = (
            rows.view(slab.tiles, slab.height, kv_heads, group, dim)
            .transpose(1, 2)
            .reshape(slab.tiles, kv_heads, slab.height * group, dim)
        )
    own = folded.shape[2]
    more = plan.rows(index, group) - own
    if more:
        folded = torch.cat((folded, folded[:, :, -1:].expand(-1, -1, more, -1)), 2)
    out = scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
    if more:
        out = out[:, :, :own]
    if slab.height == 1:
        return out.reshape(rows.shape)
    unfolded = out.reshape(slab.tiles, kv_heads, slab.height, group, dim).transpose(1, 2)
    return unfolded.reshape(rows.shape)
