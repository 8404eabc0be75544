"""The next drafts, and what survives a rejection.

A draft may come from any distribution q so long as it is scored with exactly that q. Here q is a row's own
distribution under the request's parameters, and the draft is its Gumbel-max draw, with the noise of the position that
will verify it (which the coupled rule needs, and the rejection rule permits: its acceptance draws are other streams).

**Which rows.** Every row of a forward draws a token for the position behind it. Along the *spine* (pending, drafts
1..f, the MASK rows: rows at consecutive positions, each seeing those before it) entry s predicts the token at s + 1
behind the pending one. A step that accepts j drafts commits up to position j + 1, so the next drafts are the draws of
spine entries ``j + 1 .. j + K``, as far as the spine goes (f + K):

- j >= f: all of them come from MASK rows that saw accepted drafts only. Of K MASK rows, K - (j - f) are still ahead;
- j < f: they saw the rejected draft. The published algorithm drops them and takes a cold step; salvage keeps them as
  *survivors*, K of them, for a branch round or a chain: entries j + 1 .. f are verifying rows (their draws saw more than the old
  drafts of the same positions did, and replace them), the rest MASK rows.

**Why it is exact.** Order everything drawn by position: the noise of position t is one draw per token and stream. A
draft for t + 1 is made from the noise of t alone, given a q that is made from noise before t: of drafts in front of
t + 1, committed tokens and the request's parameters. So given all that decided whether it is tried, it is a draw from
q. This holds for survivors, whose q may depend on old drafts that are never tried: these are older in that order. What
is kept depends on j, that is, on drafts that were tried, never on the value of one still to be tried.

**Fewer MASK rows.** Of a request whose rows were trimmed (:mod:`idlm_sglang.isd.trim`) to M < K MASK rows the spine ends at f + M.

**Limits.** A request keeps min(its limit, what is ahead). A narrower stride or a lower limit cuts drafts from the end,
a wider one adds none; what is clean stays so. Neither looks at values.
"""

from dataclasses import dataclass

import torch

from idlm_sglang.isd.tables import StepTables
from idlm_sglang.isd.target import SamplingRows
from idlm_sglang.isd.verify import pick, take


@dataclass(frozen=True)
class Proposal:
    """Drafts of one step.

    Attributes:
        drafts: ``(B, K)`` int64.
        counts: ``(B,)`` int64, how many of them are valid.
        log_q: ``(B, K)`` float32, log q of each draft (0 for greedy requests).
        q: ``(B, K, V)`` float32, or None when no request of the batch uses the rejection rule.
        clean: ``(B,)`` int64, how many of them are no survivors of a rejection: all or none.
        sure: ``(B, K)`` float32, log of the probability that each stands, as far as its row knows: that of a greedy request's draft, 0 for
            sampled ones. None where it was not asked for.
    """

    drafts: torch.Tensor
    counts: torch.Tensor
    log_q: torch.Tensor
    q: torch.Tensor | None
    clean: torch.Tensor
    sure: torch.Tensor | None = None


def propose(
    scores: torch.Tensor | None,
    chosen: torch.Tensor,
    rows: SamplingRows,
    run: torch.Tensor,
    forks: torch.Tensor,
    limits: torch.Tensor,
    salvage: bool,
    tables: StepTables,
    masks: torch.Tensor | None = None,
    drawn: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Proposal:
    """Drafts for the positions behind the token that this step commits last.

    Args:
        scores: ``(B, 2K + 1, V)`` log q of the K + 1 verifying rows and the K MASK rows; None where every request is greedy.
        chosen: ``(B, 2K + 1)`` int64, their draws.
        rows: sampling parameters; the full distributions are needed for the rejection rule.
        run: ``(B,)`` int64, accepted drafts j; forks: ``(B,)`` int64, f of this step.
        limits: ``(B,)`` integer, the most drafts each request may carry (its own stride minus one).
        salvage: keep survivors; otherwise a request whose MASK rows saw a rejected draft takes a cold step next.
        tables: those of K drafts.
        masks: ``(B,)`` int64, the MASK rows M of each request; None: K.
        drawn: values ``(B, R, V)`` as of :func:`certainty` and ``(B, 2K + 1)`` int64, which of their rows ``chosen`` are from; None: nobody asks how sure
            the drafts are.
    """
    found = tables.next.index_select(0, tables.pair(run, forks))
    most = limits if masks is None else torch.minimum(limits, (forks + masks - run).clamp(min=0))
    counts, clean = torch.minimum(most[:, None], found[:, :2]).unbind(1)
    if salvage:
        index = found[:, 2:]
    else:
        index, counts = tables.column[tables.k + 1 :].expand(run.shape[0], -1), clean
    drafts, q = chosen.gather(1, index), None
    if scores is None:
        log_q = torch.zeros(drafts.shape, device=drafts.device)
    else:
        log_q = take(scores, chosen).gather(1, index)
        if rows.any_greedy:
            log_q = torch.where(rows.greedy[:, None], 0.0, log_q)
        if rows.any_rejection:
            q = pick(scores, index).exp()
    sure = None
    if drawn is not None:
        sure = certainty(pick(drawn[0], drawn[1].gather(1, index)), drafts, rows) if rows.any_greedy else torch.zeros(drafts.shape, device=drafts.device)
    return Proposal(drafts, counts, log_q, q, clean, sure)


def certainty(values: torch.Tensor, drafts: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """How sure greedy drafts are.

    Args:
        values: ``(B, R, V)`` float32, those of :func:`~idlm_sglang.isd.target.target_scores` (of a greedy request: logits).
        drafts: ``(B, R)`` int64, drawn from them.

    Returns:
        ``(B, R)`` float32: log of the probability that the row gives its draft; 0 for sampled requests. Under the coupled rule those are accepted
        where target and draft distribution agree, which no row knows by itself.
    """
    sure = take(values, drafts) - values.logsumexp(-1)
    return torch.where(rows.greedy[:, None], sure, 0.0) if rows.any_sampled else sure
