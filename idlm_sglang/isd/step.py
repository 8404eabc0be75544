"""One ISD step behind the forward pass: logits in, committed tokens and next drafts out. No host synchronisation."""

from dataclasses import dataclass

import torch

from idlm_sglang.isd import noise
from idlm_sglang.isd.propose import Proposal, certainty, propose
from idlm_sglang.isd.tables import StepTables
from idlm_sglang.isd.target import SamplingRows, best, choice, target_scores
from idlm_sglang.isd.verify import accepted_by_rejection, leading, pick, residual, take, valid_drafts


@dataclass(frozen=True)
class StepOutcome:
    """Result of one step.

    Attributes:
        tokens: ``(B, N)`` int64; the first ``accept_lens`` columns are committed, the rest is arbitrary.
        accept_lens: ``(B,)`` int32, 1..N: accepted drafts plus one corrected or bonus token.
        last: ``(B,)`` int64, the last committed token, pending in the next step.
        proposal: the next drafts.
        introspection: ``(B,)`` float32, the sum of min(1, p/q) over the drafts that were tried
            (accepted ones and the first rejected one); the paper's introspective acceptance is its mean.
        deciding: ``(B,)`` int64, the row that gave the last committed token.
    """

    tokens: torch.Tensor
    accept_lens: torch.Tensor
    last: torch.Tensor
    proposal: Proposal
    introspection: torch.Tensor
    deciding: torch.Tensor


def isd_step(
    logits: torch.Tensor,
    drafts: torch.Tensor,
    counts: torch.Tensor,
    log_q: torch.Tensor,
    q: torch.Tensor | None,
    limits: torch.Tensor,
    seq_lens: torch.Tensor,
    rows: SamplingRows,
    forks: torch.Tensor | None = None,
    salvage: bool = False,
    tables: StepTables | None = None,
    masks: torch.Tensor | None = None,
) -> StepOutcome:
    """Verify the drafts of a step and draw the next ones.

    Args:
        logits: ``(B, 2K + 1, V)`` float32, the rows of :mod:`idlm_sglang.isd.layout`, MASK removed.
        drafts: ``(B, K)`` int64 as laid out; counts: ``(B,)`` integer, how many are valid.
        log_q: ``(B, K)`` float32, log q of each draft when it was drawn.
        q: ``(B, K, V)`` float32, the drafts' distributions; needed iff ``rows.any_rejection`` and K > 0.
        limits: ``(B,)`` integer, the most drafts each request may carry next.
        seq_lens: ``(B,)`` integer, position of row 0.
        rows: sampling parameters.
        forks: ``(B,)`` integer, drafts that the MASK rows saw; None: all of them (a linear step).
        salvage: a rejection leaves survivors (see :mod:`idlm_sglang.isd.propose`); otherwise a cold step follows it.
        tables: those of K drafts, on the device of the logits; None: made for this call.
        masks: ``(B,)`` int64, how many MASK rows of each request were computed (:mod:`idlm_sglang.isd.trim`); what the logits hold in the place of the
            others is not read. None: K of each. Where it is given the proposal says how sure its drafts are.
    """
    batch, width, vocab = logits.shape
    k = (width - 1) // 2
    counts = counts.to(torch.int64)
    forks = counts if forks is None else forks.to(torch.int64)
    tables = tables or StepTables(k, logits.device)
    pair = tables.pair(counts, forks)
    index = tables.reads.index_select(0, pair)
    if rows.any_sampled:
        scores = target_scores(pick(logits, index), rows)
        positions = seq_lens.to(torch.int64)[:, None] + tables.ahead.index_select(0, pair)
        chosen = choice(scores, rows, noise.gumbel(rows.seed, positions, vocab))
        verifying = scores[:, : k + 1]
    else:
        # Greedy requests need no more than the argmax, and of that a V-th has to be picked out.
        scores = verifying = None
        chosen = best(logits).gather(1, index)
    yielded = chosen[:, : k + 1]

    match = yielded[:, :k] == drafts
    accepted = match
    by_rejection = ~(rows.greedy | rows.coupled) if rows.any_rejection else None
    if rows.any_rejection and k:
        by_ratio = accepted_by_rejection(verifying[:, :k], q, drafts, rows.seed, positions[:, :k])
        accepted = torch.where(by_rejection[:, None], by_ratio, match)
    valid = valid_drafts(counts, k)
    run = leading(accepted & valid)

    at, column = run[:, None], tables.column[:k]
    last = yielded.gather(1, at).squeeze(1)
    if rows.any_rejection:
        row = at[..., None].expand(-1, -1, vocab)
        p_row = verifying.gather(1, row).squeeze(1)
        # Where every draft stood the row behind the last one has no q; residual() ignores what is read there.
        q_row = q.gather(1, row.clamp(max=max(k - 1, 0))).squeeze(1) if k else torch.zeros_like(p_row)
        behind = positions.gather(1, at)
        g = noise.gumbel(rows.seed, behind, vocab, noise.STREAM_FINAL).squeeze(1)
        drawn = best(residual(p_row, q_row, run != counts) + g)
        last = torch.where(by_rejection, drawn, last)
        tokens = torch.cat([torch.where(column < at, drafts, last[:, None]), last[:, None]], dim=1)
    else:
        # Drafts stand where they are what their row yields.
        tokens = yielded.contiguous()

    if rows.any_sampled:
        ratio = (take(verifying[:, :k], drafts) - log_q).clamp(max=0).exp()
        if rows.any_greedy:
            ratio = torch.where(rows.greedy[:, None], match.float(), ratio)
        # Where penalties and grammar together leave no token, p is not defined; the figure must stay a number.
        introspection = torch.where(valid & (column <= at), ratio.nan_to_num(0.0), 0.0).sum(1)
    else:
        # 1 for each draft that is accepted, 0 for the one that is not.
        introspection = run.float()

    drawn = None if masks is None else (logits, index) if scores is None else (scores, tables.column.expand(batch, -1))
    proposal = propose(scores, chosen, rows, run, forks, limits, salvage, tables, masks, drawn)
    return StepOutcome(tokens, (run + 1).to(torch.int32), last, proposal, introspection, run)


def first_proposal(logits: torch.Tensor, limits: torch.Tensor, seq_lens: torch.Tensor, rows: SamplingRows, sure: bool = False) -> Proposal:
    """Drafts from MASK rows that stood behind a prompt, in the prefill's own forward.

    Args:
        logits: ``(B, K, V)`` float32, MASK removed; row j is the MASK at position ``seq_lens + j``.
        limits: ``(B,)`` integer, the most drafts each request may carry.
        seq_lens: ``(B,)`` integer, length of the prompt: the position of the token that the prefill draws itself.
        rows: sampling parameters.
        sure: the proposal says how sure its drafts are.
    """
    _, k, vocab = logits.shape
    scores = target_scores(logits, rows)
    if rows.any_sampled:
        positions = seq_lens.to(torch.int64)[:, None] + torch.arange(k, device=logits.device)
        chosen = choice(scores, rows, noise.gumbel(rows.seed, positions, vocab))
    else:
        chosen = best(scores)
    log_q = torch.where(rows.greedy[:, None], 0.0, take(scores, chosen))
    counts = limits.to(torch.int64).clamp(max=k)
    q = scores.exp() if rows.any_rejection else None
    return Proposal(chosen, counts, log_q, q, counts, certainty(scores, chosen, rows) if sure else None)
