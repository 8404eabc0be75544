"""What :mod:`idlm_sglang.isd.layout` and :mod:`idlm_sglang.isd.propose` say of small numbers, looked up.

The tensors of a step outside its forward hold a few numbers per request: what they cost is the number of operations. All that depends on
two numbers of at most K alone is therefore tabulated once per K.
"""

import torch

from idlm_sglang.isd.layout import mask_rows, row_offsets, visible_rows


class StepTables:
    """The steps of K drafts per request, on one device. Every table has a row for each :meth:`pair`.

    Attributes:
        k: K; W = 2K + 1.
        column: ``(W,)`` int64, 0 .. W - 1.
        rows: ``(P, 2W)`` int64, by (counts, forks): which of [pending, draft 1 .. draft K, MASK] each row has for input, and its position
            behind the pending token's.
        reads: ``(P, W)`` int64, by (counts, forks): the K + 1 verifying rows and the K proposing ones.
        ahead: ``(P, W)`` int64, by (counts, forks): positions behind the pending token's that these rows' noise is keyed by.
        visible: ``(P, W, W)`` bool, by (counts, forks), as of :func:`~idlm_sglang.isd.layout.visible_rows`.
        next: ``(P, 2 + K)`` int64, by (run, forks): drafts that can be carried next with salvage, without it, and
            where among ``reads`` they are with salvage.
    """

    def __init__(self, k: int, device):
        width, pair = 2 * k + 1, torch.arange((k + 1) ** 2, device=device)
        first, forks = pair // (k + 1), pair % (k + 1)
        column = torch.arange(width, device=device)
        source = torch.where(column <= first[:, None], column, k + 1)
        verifying = column[: k + 1].expand(len(pair), -1)
        self.k, self.column = k, column
        self.rows = torch.cat([source, row_offsets(first, forks, width)], 1)
        self.reads = torch.cat([verifying, mask_rows(first, k)], 1)
        self.ahead = torch.cat([verifying, mask_rows(forks, k)], 1)
        self.visible = visible_rows(first, forks, width)
        self.next = _next(first, forks, k)

    def pair(self, first: torch.Tensor, forks: torch.Tensor) -> torch.Tensor:
        """The tables' row of each request: ``(B,)`` int64 of two such, 0 .. K."""
        return torch.add(forks, first, alpha=self.k + 1)

    def laid_out(self, pending: torch.Tensor, drafts: torch.Tensor, pair: torch.Tensor, mask_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Input ids of one step and their positions behind the pending tokens', both ``(B, W)`` int64: :func:`~idlm_sglang.isd.layout.step_tokens`
        and :func:`~idlm_sglang.isd.layout.row_offsets`.

        Args:
            pending: ``(B,)`` int64. drafts: ``(B, K)`` int64. pair: ``(B,)`` int64, of their counts and forks.
        """
        source, offsets = self.rows.index_select(0, pair).split(len(self.column), dim=1)
        masks = self.column.new_full((1, 1), mask_id).expand(len(drafts), 1)
        return torch.cat([pending[:, None], drafts, masks], dim=1).gather(1, source), offsets


def _next(run: torch.Tensor, forks: torch.Tensor, k: int) -> torch.Tensor:
    """``StepTables.next`` for ``run`` and ``forks`` ``(P,)``: the spine of :mod:`idlm_sglang.isd.propose` behind the run."""
    ahead = k - (run - forks).clamp(min=0)
    entry = run[:, None] + 1 + torch.arange(k, device=run.device)
    # Entries behind the spine's end are not counted; they only have to be some row.
    index = torch.where(entry <= forks[:, None], entry, entry - forks[:, None] + k).clamp(max=2 * k)
    return torch.cat([ahead[:, None], torch.where(run >= forks, ahead, 0)[:, None], index], 1)
