"""The rows of one ISD step (arXiv 2604.11035, introspective strided decoding).

A request with ``c`` valid drafts (``0 <= c <= K``) contributes the ``W = 2K + 1`` rows

    [pending, draft_1 .. draft_c, MASK x K, MASK x (K - c)]

at consecutive positions behind its committed tokens, under plain causal attention. Logits are shifted: the row
at position ``t`` predicts the token at ``t + 1``. So

- row 0 (``pending``) verifies draft 1, row ``i`` (draft ``i``) verifies draft ``i + 1``, row ``c`` gives the bonus token;
- rows ``c + 1 .. c + K`` (MASK) propose the next ``K`` drafts, for the positions behind the bonus token;
- rows behind ``c + K`` are padding that keeps the width static; nothing reads them, and no earlier row sees them.

``c = K`` is the steady state of the paper, ``c = 0`` its cold step; values between arise when the stride narrows or widens.
"""

import torch


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
    tokens = torch.full((batch, 2 * k + 1), mask_id, dtype=torch.int64, device=drafts.device)
    tokens[:, 0] = pending
    column = torch.arange(k, device=drafts.device)
    tokens[:, 1 : k + 1] = torch.where(column < counts[:, None], drafts, mask_id)
    return tokens


def step_positions(seq_lens: torch.Tensor, width: int) -> torch.Tensor:
    """Positions of one step: ``(B, width)`` int64, consecutive from ``seq_lens`` (``(B,)``, tokens with KV in the cache)."""
    return seq_lens.to(torch.int64)[:, None] + torch.arange(width, device=seq_lens.device)


def mask_rows(counts: torch.Tensor, k: int) -> torch.Tensor:
    """Row numbers of the proposing MASK rows: ``(B, K)`` int64, ``counts + 1 .. counts + K``."""
    return counts.to(torch.int64)[:, None] + 1 + torch.arange(k, device=counts.device)
