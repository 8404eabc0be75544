"""Causal attention of a ragged batch over a paged KV cache, in plain torch, without a loop over requests.

One code path serves prefill, decode, verify and mixed batches. A request's new rows are cut into *tiles* of at
most TILE_ROWS query rows. A tile sees the columns 0 .. its last row's position, so the triangle above the diagonal
costs at most one tile. Tiles of similar shape are padded to a common shape and computed together as a *slab*: one
gather of K, one of V and one `scaled_dot_product_attention` call. The number of slabs grows with the spread of the
lengths (logarithmically) and with the bytes gathered, not with the number of requests.

The query heads of a KV head are folded into the rows, so K and V are never repeated for grouped-query attention.
"""

import math
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention

TILE_ROWS = 128
# K and V of one slab stay in the cache between gather and use: 4 MiB was fastest among 1, 4, 16 and unbounded.
SLAB_BYTES = 4 << 20
# Below this, one padded slab costs less than sorting the tiles into several.
LONE_SLAB_BYTES = 1 << 20
# Masks are shared by all layers of a forward while they fit, and rebuilt in each layer when they do not.
KEPT_MASK_BYTES = 64 << 20
# Columns are padded to whole SIMD vectors: a column then always meets the same lane, whatever the padding.
COLUMN_ALIGNMENT = 16
_SHORTEST_CLASS = 64


@dataclass(frozen=True)
class Slab:
    """Tiles of one padded shape: `tiles` x `height` query rows, each tile with its own `width` columns."""

    tiles: int
    height: int
    width: int
    # (tiles * height,) int64 rows of q. A padding row repeats its tile's last row.
    q_rows: torch.Tensor
    # Where those rows are written. A padding row goes to the spare row behind the last one.
    out_rows: torch.Tensor
    # (tiles * width,) int32 KV slots. Padding repeats the tile's last slot: no tile reads another request's KV,
    # nor the pool's dummy slot 0, so a NaN there cannot leak through 0 * NaN.
    slots: torch.Tensor
    # (tiles, height, 1) int64: the last column each row sees.
    last_column: torch.Tensor
    # (tiles, height, width) bool, what `new_visible` leaves visible; None means all.
    visible: torch.Tensor | None

    def additive_mask(self, group: int, dtype: torch.dtype) -> torch.Tensor:
        """(tiles, 1, height * group, width): 0 where a row sees a column, -inf elsewhere."""
        hidden = torch.arange(self.width, device=self.slots.device) > self.last_column
        if self.visible is not None:
            hidden |= ~self.visible
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)
        return mask.unsqueeze(2).expand(-1, -1, group, -1).reshape(self.tiles, 1, self.height * group, self.width)


@dataclass(frozen=True)
class Plan:
    """What the rows of one forward attend to: the same for all layers."""

    num_rows: int
    slabs: list[Slab]
    _masks: dict[tuple[int, torch.dtype], list[torch.Tensor]] = field(default_factory=dict)

    def mask(self, index: int, group: int, dtype: torch.dtype) -> torch.Tensor:
        """The additive mask of slab `index` for `group` query heads per KV head."""
        key = (group, dtype)
        if key not in self._masks:
            cells = sum(slab.tiles * slab.height * slab.width for slab in self.slabs)
            if cells * group * dtype.itemsize > KEPT_MASK_BYTES:
                return self.slabs[index].additive_mask(group, dtype)
            self._masks[key] = [slab.additive_mask(group, dtype) for slab in self.slabs]
        return self._masks[key][index]


class Workspace:
    """Grow-only buffers for gathered K and V: fresh ones would be paged in by the kernel on every layer."""

    def __init__(self) -> None:
        self._buffers: dict[tuple, torch.Tensor] = {}

    def gather(self, name: str, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """(n, heads, dim): the rows `slots` (n,) of `cache` (total slots, heads, dim). Valid until the next call."""
        key = (name, cache.dtype, cache.device)
        row = cache.shape[1] * cache.shape[2]
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < slots.numel() * row:
            # Written inside and outside inference mode alike, so it must not be an inference tensor.
            with torch.inference_mode(False):
                buffer = torch.empty(slots.numel() * row, dtype=cache.dtype, device=cache.device)
            self._buffers[key] = buffer
        out = buffer[: slots.numel() * row].view(-1, row)
        torch.index_select(cache.view(-1, row), 0, slots, out=out)
        return out.view(-1, *cache.shape[1:])


def make_plan(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    prefix_lens: torch.Tensor,
    row_counts: torch.Tensor,
    column_bytes: int,
    new_visible: torch.Tensor | None = None,
) -> Plan:
    """Cut the new rows of a batch into slabs. The rows of q are request after request, in batch order.

    req_to_token: (request slots, columns) int32 page table. req_pool_indices: (batch,) its rows.
    prefix_lens, row_counts: (batch,) ints, columns before a request's new rows and number of new rows; a padding
    request may have 0 of both. column_bytes: bytes of K and V per column of one layer.
    new_visible: (batch, W, W) bool or None; [b, i, j] False hides new column j from new row i, on top of causality.
    Every row must keep at least one visible column.
    """
    prefix, counts = prefix_lens.cpu().long(), row_counts.cpu().long()
    tiles_per_request = (counts + (TILE_ROWS - 1)) // TILE_ROWS
    request = torch.repeat_interleave(torch.arange(len(counts)), tiles_per_request)
    if len(request) == 0:
        return Plan(num_rows=0, slabs=[])
    first_tile = torch.cumsum(tiles_per_request, 0) - tiles_per_request
    first_row = (torch.arange(len(request)) - first_tile[request]) * TILE_ROWS
    height = torch.minimum(counts[request] - first_row, torch.tensor(TILE_ROWS))
    q_start = (torch.cumsum(counts, 0) - counts)[request] + first_row
    start = prefix[request] + first_row
    if new_visible is not None and len(request) != len(counts):
        raise ValueError(f"new_visible needs between 1 and {TILE_ROWS} new rows per request")

    num_rows = int(counts.sum())
    slabs = []
    for tiles in _slab_members(height, start + height, column_bytes):
        slabs.append(
            _make_slab(
                req_to_token,
                req_pool_indices[request[tiles].to(req_pool_indices.device)],
                start[tiles],
                height[tiles],
                q_start[tiles],
                num_rows,
                None if new_visible is None else new_visible[request[tiles].to(new_visible.device)],
            )
        )
    return Plan(num_rows=num_rows, slabs=slabs)


def _slab_members(height: torch.Tensor, end: torch.Tensor, column_bytes: int) -> list[torch.Tensor]:
    """Tile indices of each slab. height, end: (tiles,) rows and columns of each tile."""
    everyone = torch.arange(len(height))
    same_height = bool((height == height[0]).all())
    if same_height and len(height) * int(end.max()) * column_bytes <= LONE_SLAB_BYTES:
        return [everyone]
    # Two width classes per octave: at most 41 % padding, about 20 % on average. One height class per octave.
    width_class = (2 * torch.log2(end.clamp(min=_SHORTEST_CLASS) / _SHORTEST_CLASS)).ceil().long()
    height_class = torch.log2(height.float()).ceil().long()
    shape_class = height_class * 1_000 + width_class
    order = torch.argsort(shape_class * (end.max() + 1) + end, stable=True)
    _, sizes = torch.unique_consecutive(shape_class[order], return_counts=True)
    members = []
    for tiles in order.split(sizes.tolist()):
        widest = _aligned(int(end[tiles].max()))
        members.extend(tiles.split(max(1, SLAB_BYTES // (widest * column_bytes))))
    return members


def _aligned(columns: int) -> int:
    return -(-columns // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT


def _make_slab(
    req_to_token: torch.Tensor,
    table_rows: torch.Tensor,
    start: torch.Tensor,
    height: torch.Tensor,
    q_start: torch.Tensor,
    num_rows: int,
    new_visible: torch.Tensor | None,
) -> Slab:
    """table_rows, start, height, q_start: (tiles,) page-table row, first position, rows, first row of q."""
    device = req_to_token.device
    end = start + height
    rows, width = int(height.max()), _aligned(int(end.max()))
    row = torch.arange(rows)
    clamped = torch.minimum(row, height[:, None] - 1)
    q_rows = (q_start[:, None] + clamped).flatten()
    out_rows = torch.where(row < height[:, None], q_start[:, None] + row, num_rows).flatten()
    # A padding request at length 0 still reads the first entry of its table row: its output is thrown away.
    column = torch.minimum(torch.arange(width), (end[:, None] - 1).clamp(min=0)).to(device)
    slots = req_to_token[table_rows[:, None], column].flatten()
    last_column = (start[:, None] + clamped).clamp(min=0)[:, :, None]
    visible = None
    if new_visible is not None:
        visible = _spread_over_columns(new_visible, start.to(device), rows, width)
    return Slab(
        tiles=len(height),
        height=rows,
        width=width,
        q_rows=q_rows.to(device),
        out_rows=out_rows.to(device),
        slots=slots,
        last_column=last_column.to(device),
        visible=visible,
    )


def _spread_over_columns(new_visible: torch.Tensor, start: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """(tiles, W, W) over new columns -> (tiles, rows, width) over all columns; prefix columns stay visible."""
    new_column = torch.arange(width, device=start.device) - start[:, None]
    index = new_column.clamp(0, new_visible.shape[2] - 1)[:, None, :].expand(-1, rows, -1)
    return torch.gather(new_visible[:, :rows], 2, index) | (new_column < 0)[:, None, :]


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
    num_tokens, q_heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    group = q_heads // kv_heads
    q = q.contiguous()
    out = q.new_empty(num_tokens + 1, q_heads, dim)
    out[plan.num_rows :] = 0
    for index, slab in enumerate(plan.slabs):
        k = workspace.gather("k", k_cache, slab.slots).to(q.dtype)
        v = workspace.gather("v", v_cache, slab.slots).to(q.dtype)
        folded = (
            q.index_select(0, slab.q_rows)
            .view(slab.tiles, slab.height, kv_heads, group, dim)
            .transpose(1, 2)
            .reshape(slab.tiles, kv_heads, slab.height * group, dim)
        )
        result = scaled_dot_product_attention(
            folded,
            k.view(slab.tiles, slab.width, kv_heads, dim).transpose(1, 2),
            v.view(slab.tiles, slab.width, kv_heads, dim).transpose(1, 2),
            attn_mask=plan.mask(index, group, q.dtype),
            scale=scale,
        )
        unfolded = result.view(slab.tiles, kv_heads, slab.height, group, dim).transpose(1, 2)
        out.index_copy_(0, slab.out_rows, unfolded.reshape(-1, q_heads, dim))
    return out[:num_tokens]
