"""Penalties inside SGLang: how often each request has used each token, counted on the device.

SGLang counts on the host from tokens that have arrived there: one token late when scheduling overlaps, and from zero
again after a retraction. Here every committed token is counted where it is chosen, so a penalised request reads the same
with and without overlap, after a retraction, and at any stride.
"""

import torch

from idlm_sglang.engine.transfer import on_device
from idlm_sglang.isd.penalties import PenaltyRows


def is_penalised(params) -> bool:
    """Whether SGLang's ``SamplingParams`` ask for a penalty or for ``min_new_tokens``."""
    return (
        params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or params.repetition_penalty != 1.0
        or params.min_new_tokens > 0
    )


def end_tokens(req, vocab: int) -> list[int]:
    """Token ids that end the request's answer, which ``min_new_tokens`` holds back."""
    tokenizer = req.tokenizer
    found = set(req.sampling_params.stop_token_ids or ()) | set(req.eos_token_ids or ())
    if tokenizer is not None:
        found |= set(getattr(tokenizer, "additional_stop_token_ids", None) or ()) | {tokenizer.eos_token_id}
    return sorted(token for token in found if token is not None and 0 <= token < vocab)


class PenalisedRows:
    """The penalised requests of one batch.

    Attributes:
        rows: host list of their row numbers; index: the same on the device, ``(P,)`` int64.
        penalties: their :class:`~idlm_sglang.isd.penalties.PenaltyRows`.
        prompt_lens: ``(P,)`` int64.
    """

    def __init__(self, reqs: list, rows: list[int], vocab: int, device):
        params = [reqs[i].sampling_params for i in rows]
        ends = [end_tokens(reqs[i], vocab) if reqs[i].sampling_params.min_new_tokens > 0 else [] for i in rows]
        min_new = [p.min_new_tokens if e else 0 for p, e in zip(params, ends)]
        width = max(map(len, ends))
        padded = [(e + e[-1:] * (width - len(e))) if e else [0] * width for e in ends]
        whole = on_device(
            torch.tensor([[i, len(reqs[i].origin_input_ids), m, *e] for i, m, e in zip(rows, min_new, padded)], dtype=torch.int64), device
        )
        real = on_device(
            torch.tensor([[p.frequency_penalty, p.presence_penalty, p.repetition_penalty] for p in params], dtype=torch.float32), device
        )
        self.rows = rows
        self.index, self.prompt_lens = whole[:, 0], whole[:, 1]
        self.penalties = PenaltyRows(
            frequency=real[:, 0],
            presence=real[:, 1],
            repetition=real[:, 2],
            min_new=whole[:, 2],
            end_tokens=whole[:, 3:],
            any_repetition=any(p.repetition_penalty != 1.0 for p in params),
            any_min_new=any(m > 0 for m in min_new),
        )


def penalised_rows(reqs: list, vocab: int, device) -> PenalisedRows | None:
    """The penalised rows of a batch, or None where there are none."""
    rows = [i for i, req in enumerate(reqs) if is_penalised(req.sampling_params)]
    return PenalisedRows(reqs, rows, vocab, device) if rows else None


class TokenCounts:
    """How often each slot's request has used each token in its output: ``(slots, V)`` int32 on the device.

    Only the slots of penalised requests are kept up to date. A slot is set from the host's tokens at every extend of its
    request (a prefill chunk, a resumption after retraction), and counts by itself from there on.
    """

    def __init__(self, slots: int, vocab: int, device):
        self.counts = torch.zeros(slots, vocab, dtype=torch.int32, device=device)

    def restart(self, slots: torch.Tensor, histories: list[list[int]]) -> None:
        """Set ``slots`` ``(P,)`` to the counts of ``histories``, each the output tokens of one request."""
        self.counts[slots] = 0
        tokens = [token for history in histories for token in history]
        if tokens:
            device = self.counts.device
            lengths = [len(history) for history in histories]
            rows = on_device(torch.repeat_interleave(torch.arange(len(histories)), torch.tensor(lengths)), device)
            flat = on_device(torch.tensor(tokens, dtype=torch.int64), device)
            self._add(slots[rows], flat, torch.ones_like(flat, dtype=torch.int32))

    def add(self, slots: torch.Tensor, tokens: torch.Tensor, lens: torch.Tensor) -> None:
        """Count the first ``lens`` ``(P,)`` of ``tokens`` ``(P, N)`` for ``slots`` ``(P,)``."""
        counted = torch.arange(tokens.shape[1], device=tokens.device) < lens[:, None]
        # Behind a request's committed tokens anything may stand; it is counted zero times, under an id that exists.
        tokens = torch.where(counted, tokens, 0)
        self._add(slots[:, None].expand_as(tokens), tokens, counted.to(torch.int32))

    def _add(self, slots: torch.Tensor, tokens: torch.Tensor, amounts: torch.Tensor) -> None:
        self.counts.index_put_((slots.to(torch.int64), tokens), amounts, accumulate=True)

    def of(self, slots: torch.Tensor) -> torch.Tensor:
        """``(P, V)`` int32."""
        return self.counts[slots]


def sampler_terms(rows: PenalisedRows, counts: torch.Tensor, next_index: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What SGLang's sampler adds to the logits of a whole batch, and what it scales them by (None where nothing is).

    Args:
        rows: the penalised ones; counts: ``(P, V)`` of them; next_index: ``(P,)``, output index of the token to be chosen.
        batch: rows of the batch.

    Returns:
        ``(B, V)`` float32 each, neutral for the other rows.
    """
    history = counts.to(torch.float32)
    terms = rows.penalties.additive(history)
    if rows.penalties.any_min_new:
        column = rows.penalties.end_tokens
        blocked = rows.penalties.blocked(next_index, 1)
        terms = terms.scatter(1, column, terms.gather(1, column).masked_fill(blocked, float("-inf")))
    additive = torch.zeros(batch, terms.shape[1], device=terms.device).index_copy_(0, rows.index, terms)
    if not rows.penalties.any_repetition:
        return additive, None
    return additive, torch.ones_like(additive).index_copy_(0, rows.index, rows.penalties.scaling(history))
