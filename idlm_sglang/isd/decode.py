"""A plain decoding loop over a model function: ISD for one prompt, without cache or engine.

It exists to be read beside the paper, and as the reference that tests and the demo's evaluation use.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from idlm_sglang.isd.layout import OFF, forks, row_offsets, step_tokens, visible_rows
from idlm_sglang.isd.step import isd_step
from idlm_sglang.isd.tables import StepTables
from idlm_sglang.isd.target import SamplingRows, host_flags
from idlm_sglang.isd.trim import Record, trim


@dataclass
class Decoded:
    """Tokens of one answer (the end token included when it was reached) and what it took.

    Attributes:
        tokens: committed token ids.
        forwards: decode forwards, the prefill not counted.
        proposed, accepted: drafts verified and accepted, by position (index 0 is position 1); survivors apart.
        introspection, tried: sum of min(1, p/q) over tried drafts, and their number.
        rows: of all decode forwards.
    """

    tokens: list[int] = field(default_factory=list)
    forwards: int = 0
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    salvage_proposed: list[int] = field(default_factory=list)
    salvage_accepted: list[int] = field(default_factory=list)
    introspection: float = 0.0
    tried: int = 0
    rows: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """Committed tokens per decode forward; the first token comes from the prefill and is left out."""
        return (len(self.tokens) - 1) / self.forwards if self.forwards else 0.0


def one_row(temperature: float = 0.0, top_k: int = 1 << 30, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0, coupled: bool = False) -> SamplingRows:
    """Sampling parameters of a single request; temperature 0 is greedy."""
    greedy = temperature == 0
    return SamplingRows(
        temperature=torch.tensor([1.0 if greedy else temperature]),
        top_k=torch.tensor([1 if greedy else min(top_k, 1 << 30)], dtype=torch.int32),
        top_p=torch.tensor([top_p]),
        min_p=torch.tensor([min_p]),
        seed=torch.tensor([seed], dtype=torch.int64),
        coupled=torch.tensor([coupled]),
        any_sampled=not greedy,
        any_rejection=not greedy and not coupled,
        **host_flags([(1 if greedy else top_k, top_p, min_p)]),
    )


@torch.no_grad()
def decode(
    model: Callable[..., torch.Tensor],
    prompt: list[int],
    stride: int,
    mask_id: int,
    rows: SamplingRows,
    max_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    salvage: str = OFF,
    trims: bool = False,
) -> Decoded:
    """Decode one prompt at a fixed stride; stride 1 is plain autoregressive decoding.

    Args:
        model: strictly causal; ``(tokens (1, T), positions (1, T)) -> logits (1, T, V)`` float32. A branch round adds a third
            argument, ``visible (1, T, T)`` bool: causality holds where it is True, row i must not see column j where it is False.
        prompt: token ids.
        stride: N >= 1.
        mask_id: the MASK token; its logit is removed here.
        rows: parameters of this one request (see :func:`one_row`).
        max_tokens: most tokens to commit.
        stop_ids: end tokens.
        salvage: what a rejection leaves: nothing (``off``), or survivors for a ``branch`` round or a ``chain``.
        trims: leave rows out that are not worth their cost (:mod:`idlm_sglang.isd.trim`); what would be read of them is NaN.
    """
    k = stride - 1
    committed = torch.tensor([prompt], dtype=torch.int64)

    def last_rows(tokens: torch.Tensor, width: int, *branch: torch.Tensor, left_out: int = 0) -> torch.Tensor:
        if left_out:
            logits = last_rows(tokens[:, :-left_out], width - left_out, *branch)
            return torch.cat([logits, logits.new_full((1, left_out, logits.shape[-1]), float("nan"))], dim=1)
        positions = torch.arange(tokens.shape[1])[None]
        if branch and branch[1] < branch[0]:
            positions[:, -width:] = positions[:, -width] + row_offsets(*branch, width)
            visible = torch.ones(1, tokens.shape[1], tokens.shape[1], dtype=torch.bool)
            visible[:, -width:, -width:] = visible_rows(*branch, width)
            logits = model(tokens, positions, visible)
        else:
            logits = model(tokens, positions)
        logits = logits[:, -width:].to(torch.float32, copy=True)
        logits[..., mask_id] = float("-inf")
        return logits

    drafts = torch.zeros(1, 0, dtype=torch.int64)
    counts = torch.zeros(1, dtype=torch.int64)
    log_q = torch.zeros(1, 0)
    logits = last_rows(committed, 1)
    vocab = logits.shape[-1]
    empty_q = torch.zeros(1, 0, vocab)
    zero = torch.zeros(1, dtype=torch.int64)
    first = isd_step(logits, drafts, counts, log_q, empty_q, zero, torch.tensor([len(prompt) - 1]), rows)
    out = Decoded([int(first.last)], 0, *([0] * k for _ in range(4)))
    clean = counts
    drafts = torch.zeros(1, k, dtype=torch.int64)
    log_q, q = torch.zeros(1, k), torch.zeros(1, k, vocab)
    limit, tables = torch.tensor([k]), StepTables(k, "cpu")
    by_rejection = rows.any_sampled and not bool(rows.coupled)
    sure, masks, left_out, record = torch.zeros(1, k), None, 0, Record()

    while len(out.tokens) < max_tokens and out.tokens[-1] not in stop_ids:
        pending = torch.tensor([out.tokens[-1]])
        if trims:
            stops, left = frozenset() if by_rejection else stop_ids, max_tokens - len(out.tokens)
            worth = trim(drafts[0, : int(counts)].tolist(), int(clean), sure[0].tolist(), stops, left, k, salvage, record.stands)
            counts, masks = torch.tensor([worth.drafts]), torch.tensor([worth.masks])
            clean, left_out = torch.minimum(clean, counts), 2 * k + 1 - len(worth)
        step = step_tokens(pending, drafts, counts, mask_id)
        seq_len = torch.tensor([committed.shape[1]])
        logits = last_rows(torch.cat([committed, step], dim=1), step.shape[1], counts, forks(clean, counts, salvage), left_out=left_out)
        result = isd_step(logits, drafts, counts, log_q, q, limit, seq_len, rows, forks(clean, counts, salvage), salvage != OFF, tables, masks)
        out.rows += step.shape[1] - left_out
        valid, accepted = int(counts), int(result.accept_lens) - 1
        linear = bool(clean == counts)
        if trims and linear:
            record.add(valid + worth.doubted, accepted)
        for position in range(valid):
            (out.proposed if linear else out.salvage_proposed)[position] += 1
            (out.accepted if linear else out.salvage_accepted)[position] += position < accepted
        out.forwards += 1
        out.introspection += float(result.introspection)
        out.tried += min(accepted + 1, valid)
        new = result.tokens[0, : accepted + 1].tolist()
        committed = torch.cat([committed, pending[None], torch.tensor([new[:-1]], dtype=torch.int64)], dim=1)
        for token in new:
            out.tokens.append(token)
            if token in stop_ids or len(out.tokens) == max_tokens:
                break
        drafts, counts, clean, log_q = result.proposal.drafts, result.proposal.counts, result.proposal.clean, result.proposal.log_q
        q = result.proposal.q if result.proposal.q is not None else q
        sure = result.proposal.sure
    return out
