"""Frequency, presence and repetition penalties and min-new-tokens for the rows of one step.

A row's penalties count every output token in front of it: the history, then drafts 1..i for row i. So a penalised
request is verified several tokens at a time and still gets the target that one token per step would give it. With
n(v) the count of token v, in SGLang's order:

    l(v) <- l(v) - frequency * n(v) - presence * [n(v) > 0]
    l(v) <- -inf                              for end tokens, while fewer than min_new tokens are out
    l(v) <- l(v) / repetition if l(v) >= 0, l(v) * repetition otherwise      where n(v) > 0

MASK rows count the drafts of the step that they see. They cannot count the tokens that will be drawn behind them; that is a matter
of q, which may be anything.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class PenaltyRows:
    """Penalties of ``P`` requests, on the compute device. Neutral values switch a penalty off.

    Attributes:
        frequency, presence: ``(P,)`` float32, 0 is off; repetition: ``(P,)`` float32, 1 is off.
        min_new: ``(P,)`` int64, output tokens before which no end token may come; 0 is off.
        end_tokens: ``(P, S)`` int64 token ids, padded by repeating one of them; S may be 0.
        any_repetition, any_min_new: host flags.
    """

    frequency: torch.Tensor
    presence: torch.Tensor
    repetition: torch.Tensor
    min_new: torch.Tensor
    end_tokens: torch.Tensor
    any_repetition: bool
    any_min_new: bool

    def at(self, index: torch.Tensor | slice) -> "PenaltyRows":
        """Those of the requests ``index`` ``(P',)`` int64, or of a slice."""
        tensors = {name: getattr(self, name)[index] for name in ("frequency", "presence", "repetition", "min_new", "end_tokens")}
        return replace(self, **tensors)

    def additive(self, counts: torch.Tensor) -> torch.Tensor:
        """What is added to logits: ``counts`` ``(P, ..)`` float32 to the same shape."""
        shape = (-1,) + (1,) * (counts.dim() - 1)
        return -(self.frequency.view(shape) * counts) - self.presence.view(shape) * (counts > 0)

    def scaling(self, counts: torch.Tensor) -> torch.Tensor:
        """The repetition factor, 1 where a token has not been used: ``(P, ..)`` to the same shape."""
        return torch.where(counts > 0, self.repetition.view((-1,) + (1,) * (counts.dim() - 1)), 1.0)

    def blocked(self, first_index: torch.Tensor, rows: int) -> torch.Tensor:
        """``(P, rows)`` bool: row r predicts output token ``first_index + r``, and that is too early for an end token."""
        return first_index[:, None] + torch.arange(rows, device=first_index.device) < self.min_new[:, None]


def _scaled(logits: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return torch.where(logits < 0, logits * factor, logits / factor)


def penalise(
    logits: torch.Tensor,
    rows: PenaltyRows,
    counts: torch.Tensor,
    drafts: torch.Tensor,
    in_front: torch.Tensor,
    first_index: torch.Tensor,
) -> torch.Tensor:
    """The penalised logits of one step.

    Args:
        logits: ``(P, R, V)`` float32.
        rows: the requests' penalties.
        counts: ``(P, V)`` integer, how often each token occurs in the output so far, the pending token included.
        drafts: ``(P, K)`` int64, ``K < R``; in_front: ``(P, R, K)`` bool, which of them stand in front of each row
            (:func:`idlm_sglang.isd.layout.drafts_in_front`).
        first_index: ``(P,)`` int64, index in the output (from 0) of the token that row 0 predicts.

    Returns:
        ``(P, R, V)`` float32, a new tensor.
    """
    batch, n_rows, _ = logits.shape
    k = drafts.shape[1]
    history = counts.to(torch.float32)
    out = logits + rows.additive(history)[:, None]
    if rows.any_repetition:
        out = _scaled(out, rows.scaling(history)[:, None])
    if k:
        # Only the drafts' own columns differ from row to row. Equal drafts share a column and get equal values.
        column = drafts[:, None].expand(batch, n_rows, k)
        same = drafts[:, :, None] == drafts[:, None]
        n = history.gather(1, drafts)[:, None] + in_front.to(torch.float32) @ same.to(torch.float32)
        value = logits.gather(2, column) + rows.additive(n)
        if rows.any_repetition:
            value = _scaled(value, rows.scaling(n))
        out.scatter_(2, column, value)
    if rows.any_min_new:
        column = rows.end_tokens[:, None].expand(-1, n_rows, -1)
        blocked = rows.blocked(first_index, n_rows)[..., None]
        out.scatter_(2, column, out.gather(2, column).masked_fill(blocked, float("-inf")))
    return out
