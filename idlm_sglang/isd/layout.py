"""The rows of one ISD step (arXiv 2604.11035, introspective strided decoding), and those behind a rejection (salvage).

A request with ``c`` drafts (``0 <= c <= K``), the first ``f`` of which its MASK rows see (the *fork*, ``0 <= f <= c``),
contributes the ``W = 2K + 1`` rows

    [pending, draft_1 .. draft_c, MASK x K, MASK x (K - c)]

Rows 0..c stand at consecutive positions behind the committed tokens, under plain causal attention. The MASK rows take
the positions behind draft ``f`` and do not see drafts ``f + 1 .. c``. Logits are shifted: the row at position ``t``
predicts the token at ``t + 1``. So

- row 0 (``pending``) verifies draft 1, row ``i`` (draft ``i``) verifies draft ``i + 1``, row ``c`` gives the bonus token;
- rows ``c + 1 .. c + K`` (MASK) propose the tokens at ``f + 2 .. f + K + 1`` behind the pending one;
- rows behind ``c + K`` are padding that keeps the width static; nothing reads them, and no earlier row sees them.

``f = c`` is the *linear* round of the paper, plain causal throughout: ``c = K`` its steady state, ``c = 0`` its cold
step; values between arise when the stride narrows or widens. ``f < c`` is a *branch* round: the drafts behind ``f`` are
survivors of a rejection, less likely to stand, and the MASK rows do not stake their proposals on them. It needs an
attention backend that hides columns. Without one survivors can be a *chain*: a linear round, ``f = c``.

KV columns follow the rows in either case; only positions and visibility differ.
"""

import torch

# What becomes of the drafts behind a rejection: dropped, or kept for a branch round or a linear one.
OFF, BRANCH, CHAIN = "off", "branch", "chain"


def forks(clean: torch.Tensor, counts: torch.Tensor, salvage: str) -> torch.Tensor:
    """``(B,)`` drafts that the MASK rows see, of ``counts``, the first ``clean`` of which are no survivors (both ``(B,)`` integer)."""
    return torch.minimum(clean, counts) if salvage == BRANCH else counts


def step_tokens(pending: torch.Tensor, drafts: torch.Tensor, counts: torch.Tensor, mask_id: int) -> torch.Tensor:
    """Input ids of one step.

    Args:
        pending: ``(B,)`` int64, the last committed token of each request; its KV is not written yet.
        drafts: ``(B, K)`` int64, the proposed tokens behind ``pending``; columns from ``counts`` on are ignored.
        counts: ``(B,)`` integer, valid drafts per request, ``0 <= counts <= K``.
        mask_id: the MASK token id.

    Returns:
        ``(B, 2K + 1)`` int64.
    """
    batch, k = drafts.shape
    column = torch.arange(k, device=drafts.device)
    masks = drafts.new_full((batch, k), mask_id)
    return torch.cat([pending[:, None], torch.where(column < counts[:, None], drafts, masks), masks], dim=1)


def step_positions(seq_lens: torch.Tensor, width: int) -> torch.Tensor:
    """Positions of a linear step, and KV columns of any: ``(B, width)`` int64, consecutive from ``seq_lens`` (``(B,)``, tokens with KV)."""
    return seq_lens.to(torch.int64)[:, None] + torch.arange(width, device=seq_lens.device)


def row_offsets(counts: torch.Tensor, forks: torch.Tensor, width: int) -> torch.Tensor:
    """Positions of the rows relative to the pending token's: ``(B, width)`` int64. ``counts``, ``forks``: ``(B,)`` integer."""
    row = torch.arange(width, device=counts.device)
    counts, forks = counts.to(torch.int64)[:, None], forks.to(torch.int64)[:, None]
    return torch.where(row > counts, row - (counts - forks), row)


def visible_rows(counts: torch.Tensor, forks: torch.Tensor, width: int) -> torch.Tensor:
    """``(B, width, width)`` bool: [b, i, j] is False where MASK row i of request b must not see draft j; causality comes on top."""
    row = torch.arange(width, device=counts.device)
    survivor = (row > forks[:, None]) & (row <= counts[:, None])
    masked = row > counts[:, None]
    return ~(masked[:, :, None] & survivor[:, None, :])


def drafts_in_front(counts: torch.Tensor, forks: torch.Tensor, k: int, rows: int) -> torch.Tensor:
    """``(B, rows, K)`` bool: draft j + 1 stands in front of row i and is seen by it."""
    row = torch.arange(rows, device=counts.device)[:, None]
    draft = torch.arange(1, k + 1, device=counts.device)
    counts, forks = counts[:, None, None], forks[:, None, None]
    return (draft <= row) & (draft <= counts) & ((row <= counts) | (draft <= forks))


def mask_rows(counts: torch.Tensor, k: int) -> torch.Tensor:
    """Row numbers of the proposing MASK rows: ``(B, K)`` int64, ``counts + 1 .. counts + K``."""
    return counts.to(torch.int64)[:, None] + 1 + torch.arange(k, device=counts.device)
