"""Which drafts stand, and the one token behind them: the two exact rules.

Both emit tokens distributed exactly as plain autoregressive sampling from the target p:

- *rejection* (the paper's criterion): keep draft x with probability min(1, p(x) / q(x)); at the first rejection draw
  from max(0, p - q) renormalised; when all stand, draw the bonus from p;
- *coupled*: row i yields y_i = argmax(log p_i + g_i) with noise g keyed by position and token id; a draft stands when
  it equals the token its row yields. What is emitted is always y, whatever was drafted. Greedy is the case g = 0.
"""

import torch

from idlm_sglang.isd import noise


def leading(accepted: torch.Tensor) -> torch.Tensor:
    """Length of the leading run of True per request: ``(B, K)`` bool to ``(B,)`` int64."""
    return accepted.to(torch.int64).cumprod(dim=1).sum(dim=1)


def valid_drafts(counts: torch.Tensor, k: int) -> torch.Tensor:
    """``(B, K)`` bool: columns that hold a draft."""
    return torch.arange(k, device=counts.device) < counts[:, None]


def take(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """``scores[b, i, tokens[b, i]]``: ``(B, R, V)`` and ``(B, R)`` to ``(B, R)``."""
    return scores.gather(-1, tokens[..., None]).squeeze(-1)


def pick(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``values[b, index[b, i]]``: ``(B, W, V)`` and ``(B, R)`` int64 to ``(B, R, V)``. Whole rows: a gather would look each of the V up."""
    batch, width, vocab = values.shape
    flat = index + torch.arange(0, batch * width, width, device=index.device)[:, None]
    return values.reshape(-1, vocab).index_select(0, flat.view(-1)).view(batch, -1, vocab)


def accepted_by_rejection(
    scores: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """u < p(x) / q(x) for every draft.

    Args:
        scores: ``(B, K, V)`` log p of the rows that verify drafts 1..K.
        q: ``(B, K, V)`` probabilities the drafts were drawn from.
        drafts: ``(B, K)`` int64.
        seeds: ``(B,)`` int64; positions: ``(B, K)`` of the verifying rows.

    Returns:
        ``(B, K)`` bool.
    """
    u = noise.uniform(seeds, positions, noise.STREAM_ACCEPT)
    return u * take(q, drafts) < take(scores, drafts).exp()


def residual(scores: torch.Tensor, q: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Unnormalised log of the distribution of the token behind the accepted drafts (rejection rule).

    Args:
        scores: ``(B, V)`` log p of the deciding row.
        q: ``(B, V)`` the rejected draft's distribution.
        rejected: ``(B,)`` bool; False where every draft stood, and p itself is the answer.

    Returns:
        ``(B, V)`` float32.
    """
    p = scores.exp()
    left = (p - q).clamp_(min=0)
    # p = q up to rounding leaves nothing to draw from: such a rejection has probability zero, p is its limit.
    use_left = rejected & (left.sum(dim=-1) > 0)
    return torch.where(use_left[:, None], left, p).log()
