"""Random paged batches, and attention over them the slow way: one request at a time, in float64."""

import random
from dataclasses import dataclass

import torch

from idlm_sglang.platform.tile_plan import Plan, make_plan
from idlm_sglang.platform.tiled_attention import Workspace, attend


@dataclass
class PagedBatch:
    """New rows of some requests and the cache they look at; slot 0 is the pool's dummy, as in SGLang."""

    q: torch.Tensor  # (rows, q heads, dim)
    k_cache: torch.Tensor  # (slots, kv heads, dim)
    v_cache: torch.Tensor
    req_to_token: torch.Tensor  # (table rows, columns) int32
    req_pool_indices: torch.Tensor  # (batch,)
    prefix_lens: torch.Tensor  # (batch,)
    row_counts: torch.Tensor  # (batch,)

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    def plan(self, new_visible: torch.Tensor | None = None, one_order: bool = False) -> Plan:
        """As the backend asks for it: one int when every request brings the same number of rows."""
        distinct = set(self.row_counts.tolist())
        counts = distinct.pop() if len(distinct) == 1 else self.row_counts
        column_bytes = 2 * self.k_cache[0].nbytes
        return make_plan(
            self.req_to_token, self.req_pool_indices, self.prefix_lens, counts, column_bytes, new_visible, one_order
        )

    def attend(self, new_visible: torch.Tensor | None = None, one_order: bool = False) -> torch.Tensor:
        return attend(self.q, self.k_cache, self.v_cache, self.plan(new_visible, one_order), Workspace(), self.scale)

    def rows_of(self, request: int) -> slice:
        start = int(self.row_counts[:request].sum())
        return slice(start, start + int(self.row_counts[request]))

    def alone(self, request: int) -> "PagedBatch":
        one = slice(request, request + 1)
        return PagedBatch(
            self.q[self.rows_of(request)].contiguous(),
            self.k_cache,
            self.v_cache,
            self.req_to_token,
            self.req_pool_indices[one],
            self.prefix_lens[one],
            self.row_counts[one],
        )


def paged_batch(
    prefix_lens: list[int],
    row_counts: list[int],
    heads: tuple[int, int, int] = (4, 2, 64),
    dtype: torch.dtype = torch.float32,
    page_size: int = 1,
    seed: int = 0,
) -> PagedBatch:
    """Requests on shuffled pages of `page_size` slots, none of them slot 0. heads: (q heads, kv heads, dim)."""
    generator = torch.Generator().manual_seed(seed)
    q_heads, kv_heads, dim = heads
    batch = len(prefix_lens)
    columns = max(prefix + rows for prefix, rows in zip(prefix_lens, row_counts))
    pages = -(-columns // page_size)
    table_rows = batch + 3
    first_slot = (torch.randperm(table_rows * pages, generator=generator).view(table_rows, pages) + 1) * page_size
    req_to_token = (first_slot[:, :, None] + torch.arange(page_size)).flatten(1)[:, : max(columns, 1)].int()
    slots = (table_rows * pages + 1) * page_size
    order = list(range(1, table_rows))
    random.Random(seed).shuffle(order)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return PagedBatch(
        q=draw(sum(row_counts), q_heads, dim),
        k_cache=draw(slots, kv_heads, dim),
        v_cache=draw(slots, kv_heads, dim),
        req_to_token=req_to_token,
        req_pool_indices=torch.tensor(order[:batch]),
        prefix_lens=torch.tensor(prefix_lens),
        row_counts=torch.tensor(row_counts),
    )


def naive_attention(batch: PagedBatch, new_visible: torch.Tensor | None = None) -> torch.Tensor:
    """(rows, q heads, dim) float64; the definition `attend` is held against."""
    outputs = []
    group = batch.q.shape[1] // batch.k_cache.shape[1]
    for request, (prefix, rows) in enumerate(zip(batch.prefix_lens.tolist(), batch.row_counts.tolist())):
        slots = batch.req_to_token[batch.req_pool_indices[request], : prefix + rows].long()
        q = batch.q[batch.rows_of(request)].double()
        k = batch.k_cache[slots].double().repeat_interleave(group, 1)
        v = batch.v_cache[slots].double().repeat_interleave(group, 1)
        scores = torch.einsum("rhd,chd->hrc", q, k) * batch.scale
        column = torch.arange(prefix + rows)
        sees = column <= prefix + torch.arange(rows)[:, None]
        if new_visible is not None:
            sees[:, prefix:] &= new_visible[request]
        weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hrc,chd->rhd", weights, v))
    return torch.cat(outputs)
