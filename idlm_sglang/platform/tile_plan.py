"""How the rows of one forward are cut into tiles and slabs (see `tiled_attention`). Same for all layers."""

import math
from dataclasses import dataclass, field

import torch

TILE_ROWS = 128
# K and V of one slab are to stay in the cache between gather and use.
SLAB_BYTES = 4 << 20
# Below the first, one padded slab costs less than sorting the tiles into several; up to the second, where padding adds no more than sorting would.
LONE_SLAB_BYTES = 1 << 20
EVEN_SLAB_BYTES = 8 << 20
_PADDING = 1.75
# Tiles of different heights share a slab where none has more rows than this: 2N - 1 at the largest stride.
_ALIKE = 31
# Masks are shared by all layers of a forward while they fit, and rebuilt in each layer when they do not.
KEPT_MASK_BYTES = 64 << 20
# Columns are padded to whole SIMD vectors: a column then always meets the same lane, whatever the padding.
COLUMN_ALIGNMENT = 16
_SHORTEST_CLASS = 64
# The attention kernel takes columns in blocks of the second number. A product of its GEMM adds up a block of more columns than the first
# in several parts, whose bounds move with the block's end.
_WHOLE_PRODUCT, _BLOCK = 192, 512
# The same GEMM has other kernels for fewer rows.
_FEWEST_ROWS = 4


def rows_computed(rows: int) -> int:
    """How many query rows ``rows`` are filled up to, so that the kernel's last block of them has _FEWEST_ROWS at least."""
    block = 32 if rows < 192 else 64 if rows < 768 else 256
    return rows + max(_FEWEST_ROWS - rows % block, 0) if rows % block else rows


@dataclass(frozen=True)
class Slab:
    """Tiles of one padded shape: `tiles` x `height` query rows, each tile with its own `width` columns."""

    tiles: int
    height: int
    width: int
    # (tiles * width,) int32 KV slots. Padding repeats the tile's last slot: no tile reads another request's KV,
    # nor the pool's dummy slot 0, so a NaN there cannot leak through 0 * NaN.
    slots: torch.Tensor
    # (tiles, height, 1) int64: the last column each row sees.
    last_column: torch.Tensor
    # (tiles, height, width) bool, what `new_visible` leaves visible; None means all.
    visible: torch.Tensor | None = None
    # (tiles * height,) int64 rows of q, a padding row repeating its tile's last row; None means all of q in order.
    q_rows: torch.Tensor | None = None
    # Where those rows are written. A padding row goes to the spare row behind the last one.
    out_rows: torch.Tensor | None = None

    def additive_mask(self, group: int, dtype: torch.dtype, rows: int) -> torch.Tensor:
        """(tiles, 1, rows, width): 0 where a row sees a column, -inf elsewhere; rows behind the height * group repeat the last."""
        hidden = torch.arange(self.width, device=self.slots.device) > self.last_column
        if self.visible is not None:
            hidden |= ~self.visible
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)
        mask = mask.unsqueeze(2).expand(-1, -1, group, -1).reshape(self.tiles, 1, self.height * group, self.width)
        more = rows - mask.shape[2]
        return torch.cat((mask, mask[:, :, -1:].expand(-1, -1, more, -1)), 2) if more else mask


@dataclass(frozen=True)
class Plan:
    """The slabs of one forward, which together hold each of its `num_rows` rows once.

    one_order: a row is to be the same bits whatever else is computed in the forward: its sums are added up in one order.
    """

    num_rows: int
    slabs: list[Slab]
    one_order: bool = False
    _masks: dict[tuple[int, torch.dtype], list[torch.Tensor]] = field(default_factory=dict)

    @property
    def is_whole_batch(self) -> bool:
        """The only slab is the batch itself: nothing to pick out of q or to put back."""
        return len(self.slabs) == 1 and self.slabs[0].q_rows is None

    def rows(self, index: int, group: int) -> int:
        """Query rows of each tile of slab `index` and KV head, filled up where `one_order` asks for it."""
        rows = self.slabs[index].height * group
        return rows_computed(rows) if self.one_order else rows

    def mask(self, index: int, group: int, dtype: torch.dtype) -> torch.Tensor:
        """The additive mask of slab `index` for `group` query heads per KV head."""
        key = (group, dtype)
        if key not in self._masks:
            cells = sum(slab.tiles * self.rows(i, group) * slab.width for i, slab in enumerate(self.slabs))
            if cells * dtype.itemsize > KEPT_MASK_BYTES:
                return self.slabs[index].additive_mask(group, dtype, self.rows(index, group))
            self._masks[key] = [slab.additive_mask(group, dtype, self.rows(i, group)) for i, slab in enumerate(self.slabs)]
        return self._masks[key][index]


def make_plan(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    prefix_lens: torch.Tensor,
    row_counts: torch.Tensor | int,
    column_bytes: int,
    new_visible: torch.Tensor | None = None,
    one_order: bool = False,
) -> Plan:
    """Cut the new rows of a batch into slabs. The rows of q are request after request, in batch order.

    req_to_token: (request slots, columns) int32 page table. req_pool_indices: (batch,) its rows.
    prefix_lens: (batch,) ints, columns before a request's new rows. row_counts: new rows of each request, (batch,)
    ints or one int for all; 0 for a padding request. column_bytes: K and V of one column of one layer.
    new_visible: (batch, W, W) bool or None, W the rows of every request; [b, i, j] False hides new column j from
    new row i, on top of causality. Every row must keep at least one visible column. one_order: as in :class:`Plan`.
    """
    if isinstance(row_counts, int):
        width = _aligned(int(prefix_lens.max()) + row_counts, one_order)
        if row_counts <= TILE_ROWS and _one_slab(prefix_lens, row_counts, width, column_bytes):
            slab = _whole_batch_slab(req_to_token, req_pool_indices, prefix_lens, row_counts, width, new_visible)
            return Plan(len(prefix_lens) * row_counts, [slab], one_order)
        row_counts = torch.full_like(prefix_lens, row_counts)
    prefix, counts = prefix_lens.cpu().long(), row_counts.cpu().long()
    fewest, most = (int(n) for n in counts.aminmax())
    if 0 < fewest and most <= _ALIKE and _one_slab(prefix, most, _aligned(int(prefix.max()) + most, one_order), column_bytes):
        ends = counts.cumsum(0)
        slab = _slab(req_to_token, req_pool_indices, prefix, counts, ends - counts, int(ends[-1]), new_visible, one_order)
        return Plan(int(ends[-1]), [slab], one_order)

    tiles_per_request = (counts + (TILE_ROWS - 1)) // TILE_ROWS
    request = torch.repeat_interleave(torch.arange(len(counts)), tiles_per_request)
    if new_visible is not None and len(request) != len(counts):
        raise ValueError(f"new_visible needs between 1 and {TILE_ROWS} new rows per request")
    first_tile = torch.cumsum(tiles_per_request, 0) - tiles_per_request
    first_row = (torch.arange(len(request)) - first_tile[request]) * TILE_ROWS
    height = (counts[request] - first_row).clamp(max=TILE_ROWS)
    q_start = (torch.cumsum(counts, 0) - counts)[request] + first_row
    start = prefix[request] + first_row

    num_rows = int(counts.sum())
    slabs = []
    for tiles in _slab_members(height, start + height, column_bytes, one_order):
        members = request[tiles].to(req_to_token.device)
        slabs.append(
            _slab(
                req_to_token,
                req_pool_indices[members],
                start[tiles],
                height[tiles],
                q_start[tiles],
                num_rows,
                None if new_visible is None else new_visible[members],
                one_order,
            )
        )
    return Plan(num_rows, slabs, one_order)


def _one_slab(prefix_lens: torch.Tensor, row_counts: int, width: int, column_bytes: int) -> bool:
    padded = len(prefix_lens) * width
    if padded * column_bytes <= LONE_SLAB_BYTES:
        return True
    needed = int(prefix_lens.sum()) + len(prefix_lens) * row_counts
    return padded * column_bytes <= EVEN_SLAB_BYTES and padded <= _PADDING * needed


def make_parts(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    prefix_lens: torch.Tensor,
    row_counts: list[int],
    column_bytes: int,
    new_visible: torch.Tensor | None = None,
    one_order: bool = False,
    step: int = 0,
) -> list[Plan]:
    """Plans of a batch's rows in order: requests of any row counts, then the ``step`` ones of a decode step behind them; where none are named, those that
    all have the last one's row count, where it is low.

    In slabs of their own nothing of a step's rows is padded to a prompt's, nor, where they are of one height, picked out of q.
    Arguments as for :func:`make_plan`, ``row_counts`` on the host; ``new_visible`` is of the step's requests alone.
    """
    first = len(row_counts) - step
    if not step:
        while first > 0 and row_counts[first - 1] == row_counts[-1]:
            first -= 1
        if row_counts[-1] == 0 or max(row_counts[:first], default=0) < 2 * row_counts[-1]:
            first = 0
    plans = []
    for part in (slice(0, first), slice(first, None)):
        counts = row_counts[part]
        if counts:
            rows = counts[0] if len(set(counts)) == 1 else torch.tensor(counts)
            visible = new_visible if part.stop is None else None
            plans.append(make_plan(req_to_token, req_pool_indices[part], prefix_lens[part], rows, column_bytes, visible, one_order))
    return plans


def _slab_members(height: torch.Tensor, end: torch.Tensor, column_bytes: int, one_order: bool) -> list[torch.Tensor]:
    """Tile indices of each slab. height, end: (tiles,) rows and columns of each tile."""
    if len(height) == 0:
        return []
    # Two width classes per octave pad a column by 41 % at most, and one height class per octave. A tall tile is
    # work enough for a call of its own, so those are padded by less than a tile's width.
    width_class = (2 * torch.log2(end.clamp(min=_SHORTEST_CLASS) / _SHORTEST_CLASS)).ceil().long()
    width_class = torch.where(height * 2 > TILE_ROWS, (end + (TILE_ROWS - 1)) // TILE_ROWS, width_class)
    height_class = torch.log2(height.float()).ceil().long()
    longest = end.max() + 1
    shape_class = height_class * longest + width_class
    order = torch.argsort(shape_class * longest + end, stable=True)
    _, sizes = torch.unique_consecutive(shape_class[order], return_counts=True)
    members = []
    for tiles in order.split(sizes.tolist()):
        width = _aligned(int(end[tiles[-1]]), one_order)
        members.extend(tiles.split(max(1, SLAB_BYTES // (width * column_bytes))))
    return members


def _aligned(columns: int, one_order: bool) -> int:
    if one_order and columns % _BLOCK > _WHOLE_PRODUCT:
        return -(-columns // _BLOCK) * _BLOCK
    return -(-columns // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT


def _whole_batch_slab(
    req_to_token: torch.Tensor,
    table_rows: torch.Tensor,
    start: torch.Tensor,
    height: int,
    width: int,
    new_visible: torch.Tensor | None,
) -> Slab:
    """table_rows, start: (batch,) page-table row and first position of each request's `height` rows."""
    start = start[:, None]
    last_column = start + torch.arange(height, device=start.device)
    return Slab(
        tiles=len(start),
        height=height,
        width=width,
        slots=_read_slots(req_to_token, table_rows, last_column[:, -1:], width),
        last_column=last_column[:, :, None],
        visible=None if new_visible is None else _spread_over_columns(new_visible, start, height, width),
    )


def _slab(
    req_to_token: torch.Tensor,
    table_rows: torch.Tensor,
    start: torch.Tensor,
    heights: torch.Tensor,
    q_start: torch.Tensor,
    num_rows: int,
    new_visible: torch.Tensor | None,
    one_order: bool,
) -> Slab:
    """table_rows, start, heights, q_start: (tiles,) page-table row, first position, rows, first row of q."""
    device = req_to_token.device
    start, heights, q_start = start[:, None], heights[:, None], q_start[:, None]
    height, width = int(heights.max()), _aligned(int((start + heights).max()), one_order)
    row = torch.arange(height)
    clamped = torch.minimum(row, heights - 1)
    last_column = (start + clamped).to(device)
    return Slab(
        tiles=len(start),
        height=height,
        width=width,
        slots=_read_slots(req_to_token, table_rows, last_column[:, -1:], width),
        last_column=last_column[:, :, None],
        visible=None if new_visible is None else _spread_over_columns(new_visible, start.to(device), height, width),
        q_rows=(q_start + clamped).flatten().to(device),
        out_rows=torch.where(row < heights, q_start + row, num_rows).flatten().to(device),
    )


def _read_slots(
    req_to_token: torch.Tensor, table_rows: torch.Tensor, last_column: torch.Tensor, width: int
) -> torch.Tensor:
    """(tiles * width,) slots of columns 0 .. width - 1; those behind last_column (tiles, 1) repeat its slot."""
    column = torch.minimum(torch.arange(width, device=req_to_token.device), last_column)
    return req_to_token[table_rows[:, None], column].flatten()


def _spread_over_columns(new_visible: torch.Tensor, start: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(tiles, W, W) over new columns -> (tiles, height, width) over all columns; prefix columns stay visible."""
    new_column = torch.arange(width, device=start.device) - start
    index = new_column.clamp(0, new_visible.shape[2] - 1)[:, None, :].expand(-1, height, -1)
    return torch.gather(new_visible, 2, index) | (new_column < 0)[:, None, :]
