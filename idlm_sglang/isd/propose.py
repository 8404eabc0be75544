"""The next drafts, from the MASK rows.

A draft may come from any distribution q so long as it is scored with exactly that q. Here q is the MASK row's own
distribution under the request's parameters, and the draft is its Gumbel-max draw, with the noise of the row that will
verify it (which the coupled rule needs, and the rejection rule permits: its acceptance draws are other streams).
"""

from dataclasses import dataclass

import torch

from idlm_sglang.isd.verify import take


@dataclass(frozen=True)
class Proposal:
    """Drafts of one step.

    Attributes:
        drafts: ``(B, K)`` int64.
        counts: ``(B,)`` int64, how many of them are valid.
        log_q: ``(B, K)`` float32, log q of each draft (0 for greedy requests).
        q: ``(B, K, V)`` float32, or None when no request of the batch uses the rejection rule.
    """

    drafts: torch.Tensor
    counts: torch.Tensor
    log_q: torch.Tensor
    q: torch.Tensor | None


def propose(
    scores: torch.Tensor, chosen: torch.Tensor, greedy: torch.Tensor, standing: torch.Tensor, limits: torch.Tensor, keep_q: bool
) -> Proposal:
    """Drafts for the positions behind the token that this step commits last.

    Args:
        scores: ``(B, K, V)`` log q of the MASK rows.
        chosen: ``(B, K)`` int64, their draws.
        greedy: ``(B,)`` bool.
        standing: ``(B,)`` bool: every draft of this step was accepted. Otherwise the MASK rows were conditioned on a
            rejected token; the published algorithm drops them and takes a cold step next.
        limits: ``(B,)`` integer, the most drafts each request may carry (its own stride minus one).
        keep_q: whether the full distributions are needed.
    """
    k = chosen.shape[1]
    log_q = torch.where(greedy[:, None], 0.0, take(scores, chosen))
    counts = torch.where(standing, limits.to(torch.int64).clamp(max=k), 0)
    return Proposal(chosen, counts, log_q, scores.exp() if keep_q else None)
