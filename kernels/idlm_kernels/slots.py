"""What a step reads and writes per slot, each in one launch: one program per request.

`load` makes a step's inputs out of the kept drafts: truncated to the limit and to K, and only where the stamp (request number, length) fits. `store`
keeps the next drafts under the new stamp. They are `engine.step_inputs.load` (with the rows that are read) and `engine.state.SlotState.store`
(with the new lengths and the figures of a step).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl


class State(Protocol):
    """`engine.state.SlotState`: ``drafts (S, K')`` int64, ``log_q (S, K')`` float32, the others ``(S,)`` int64 of one stride between slots."""

    drafts: torch.Tensor
    counts: torch.Tensor
    clean_counts: torch.Tensor
    log_q: torch.Tensor
    numbers: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class StepInputs:
    """Of ``B`` requests, K drafts, W = 2K + 1 rows.

    Attributes:
        tokens: ``(B, W)`` int64 input ids. rotary: ``(B, W)`` int64 positions, none behind the last of the rotary table.
        kv_slots: ``(B, W)`` int64 from the page table. positions, index: ``(B, W)`` int64 for :class:`idlm_kernels.rows.Rows`.
        drafts: ``(B, K)`` int64; counts, clean: ``(B,)`` int64; log_q: ``(B, K)`` float32: what was carried.
        forks: ``(B,)`` int64, drafts that the MASK rows see.
    """

    tokens: torch.Tensor
    rotary: torch.Tensor
    kv_slots: torch.Tensor
    positions: torch.Tensor
    index: torch.Tensor
    drafts: torch.Tensor
    counts: torch.Tensor
    clean: torch.Tensor
    forks: torch.Tensor
    log_q: torch.Tensor


@dataclass(frozen=True)
class Round:
    """What a step did with the drafts it was given: ``counts``, ``clean``, ``accept_lens`` ``(B,)`` integer, ``introspection`` ``(B,)`` float32."""

    counts: torch.Tensor
    clean: torch.Tensor
    accept_lens: torch.Tensor
    introspection: torch.Tensor


@triton.jit
def _load(
    slots, numbers, seq_lens, limits, pending, kept_drafts, kept_counts, kept_clean, kept_log_q, kept_numbers, kept_lengths,
    stride_drafts, stride_head, stride_log_q, table, table_width, stride_table, tokens_out, rotary_out, kv_out, positions_out, index_out,
    drafts_out, counts_out, clean_out, forks_out, log_q_out, mask_id, last_position, K: tl.constexpr, COLUMNS: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    slot = tl.load(slots + request).to(tl.int64)
    length = tl.load(seq_lens + request).to(tl.int64)
    head = slot * stride_head
    fits = (tl.load(kept_numbers + head) == tl.load(numbers + request).to(tl.int64)) & (tl.load(kept_lengths + head) == length)
    count = tl.minimum(tl.minimum(tl.load(kept_counts + head), tl.load(limits + request).to(tl.int64)), K)
    count = tl.where(fits, count, 0)
    clean = tl.minimum(tl.load(kept_clean + head), count)
    fork = clean if BRANCH else count
    tl.store(counts_out + request, count)
    tl.store(clean_out + request, clean)
    tl.store(forks_out + request, fork)

    column = tl.arange(0, COLUMNS)
    drafted = (column > 0) & (column <= K)
    draft = tl.load(kept_drafts + slot * stride_drafts + column - 1, mask=drafted, other=0)
    log_q = tl.load(kept_log_q + slot * stride_log_q + column - 1, mask=drafted, other=0.0)
    tl.store(drafts_out + request * K + column - 1, draft, mask=drafted)
    tl.store(log_q_out + request * K + column - 1, log_q, mask=drafted)
    token = tl.where(drafted & (column <= count), draft, mask_id)
    token = tl.where(column == 0, tl.load(pending + request).to(tl.int64), token)

    inside = column < 2 * K + 1
    place = request * (2 * K + 1) + column
    stored_at = length + column
    position = tl.where(column > count, stored_at - (count - fork), stored_at)
    tl.store(tokens_out + place, token, mask=inside)
    tl.store(positions_out + place, position, mask=inside)
    tl.store(rotary_out + place, tl.minimum(position, last_position), mask=inside)
    tl.store(index_out + place, tl.where(column <= count + K, column, -1).to(tl.int64), mask=inside)
    kv = tl.load(table + slot * stride_table + stored_at, mask=inside & (stored_at < table_width), other=0)
    tl.store(kv_out + place, kv.to(tl.int64), mask=inside)


@triton.jit
def _store(
    slots, numbers, seq_lens, drafts, counts, clean, log_q, kept_drafts, kept_counts, kept_clean, kept_log_q, kept_numbers, kept_lengths,
    stride_drafts, stride_head, stride_log_q, tried, tried_clean, accept_lens, introspection, lengths_out, figures_out,
    K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    slot = tl.load(slots + request).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    head = slot * stride_head
    length = tl.load(seq_lens + request).to(tl.int64)
    if accept_lens is not None:
        accepted = tl.load(accept_lens + request).to(tl.int64)
        length += accepted
        tl.store(lengths_out + request, length)
        tl.store(figures_out + request * 4, tl.load(tried + request).to(tl.float32))
        tl.store(figures_out + request * 4 + 1, (accepted - 1).to(tl.float32))
        tl.store(figures_out + request * 4 + 2, tl.load(introspection + request))
        tl.store(figures_out + request * 4 + 3, tl.load(tried_clean + request).to(tl.float32))
    tl.store(kept_drafts + slot * stride_drafts + column, tl.load(drafts + request * K + column, mask=column < K, other=0), mask=column < K)
    tl.store(kept_log_q + slot * stride_log_q + column, tl.load(log_q + request * K + column, mask=column < K, other=0.0), mask=column < K)
    tl.store(kept_counts + head, tl.load(counts + request).to(tl.int64))
    tl.store(kept_clean + head, tl.load(clean + request).to(tl.int64))
    tl.store(kept_numbers + head, tl.load(numbers + request).to(tl.int64))
    tl.store(kept_lengths + head, length)


def _kept(state: State) -> tuple:
    heads = (state.counts, state.clean_counts, state.numbers, state.lengths)
    if len({part.stride(0) for part in heads}) > 1 or state.drafts.stride(1) != 1 or state.log_q.stride(1) != 1:
        raise ValueError("columns of the state with different strides between slots, or drafts that are not side by side")
    counts, clean, numbers, lengths = heads
    return state.drafts, counts, clean, state.log_q, numbers, lengths, state.drafts.stride(0), counts.stride(0), state.log_q.stride(0)


def load(
    state: State,
    slots: torch.Tensor,
    numbers: torch.Tensor,
    seq_lens: torch.Tensor,
    limits: torch.Tensor,
    pending: torch.Tensor,
    k: int,
    table: torch.Tensor,
    mask_id: int,
    last_position: int,
    branch: bool = False,
) -> StepInputs:
    """The inputs of one step.

    Args:
        slots, numbers, seq_lens, limits, pending: ``(B,)`` integer: slot, request number, tokens with KV, most drafts, last committed token.
        k: drafts per request in this step, at most the state's.
        table: ``(S, T)`` integer page table (`req_to_token`); rows behind T get KV slot 0, the padding slot.
        last_position: of the rotary table.
        branch: survivors of a rejection are hidden from the MASK rows, which take the positions behind the clean drafts.
    """
    batch, width, most = len(slots), 2 * k + 1, state.drafts.shape[1]
    if k > most:
        raise ValueError(f"{k} drafts of slots that keep {most}; allowed: at most that")
    slots, numbers, seq_lens, limits, pending = (part.contiguous() for part in (slots, numbers, seq_lens, limits, pending))
    made = [torch.empty(batch, width, dtype=torch.int64, device=slots.device) for _ in range(5)]
    drafts = torch.empty(batch, k, dtype=torch.int64, device=slots.device)
    counts, clean, forks = (torch.empty(batch, dtype=torch.int64, device=slots.device) for _ in range(3))
    log_q = torch.empty(batch, k, device=slots.device)
    if batch:
        _load[(batch,)](
            slots, numbers, seq_lens, limits, pending, *_kept(state), table, table.shape[1], table.stride(0), *made, drafts, counts, clean, forks, log_q,
            mask_id, last_position, K=k, COLUMNS=triton.next_power_of_2(width), BRANCH=branch, num_warps=1,
        )  # fmt: skip
    return StepInputs(*made, drafts, counts, clean, forks, log_q)


def store(
    state: State,
    slots: torch.Tensor,
    numbers: torch.Tensor,
    seq_lens: torch.Tensor,
    drafts: torch.Tensor,
    counts: torch.Tensor,
    clean: torch.Tensor,
    log_q: torch.Tensor,
    verified: Round | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keep drafts of ``slots``, stamped with the request and its length: ``seq_lens``, and what ``verified`` adds to them.

    q is written by :func:`idlm_kernels.store_q.store_q`.

    Args:
        slots, numbers, seq_lens: as for :func:`load`.
        drafts: ``(B, K)`` int64; counts, clean: ``(B,)`` integer; log_q: ``(B, K)`` float32.
        verified: of the step that the drafts are from; without it they are from no step.

    Returns:
        The lengths ``(B,)``, and the figures of ``verified`` ``(B, 4)`` float32: drafts, accepted drafts, introspection, clean drafts.
    """
    batch, k = drafts.shape
    lengths, figures, made = seq_lens, None, (None,) * 6
    if verified is not None:
        lengths, figures = torch.empty_like(seq_lens), torch.empty(batch, 4, device=seq_lens.device)
        made = verified.counts, verified.clean, verified.accept_lens, verified.introspection, lengths, figures
    if batch:
        vectors = (part.contiguous() for part in (slots, numbers, seq_lens, drafts, counts, clean, log_q))
        _store[(batch,)](*vectors, *_kept(state), *made, K=k, COLUMNS=triton.next_power_of_2(max(k, 1)), num_warps=1)
    return lengths, figures


def load_reference(state, slots, numbers, seq_lens, limits, pending, k, table, mask_id, last_position, branch=False) -> StepInputs:
    """:func:`load` in plain torch."""
    fits = (state.numbers[slots] == numbers) & (state.lengths[slots] == seq_lens)
    counts = torch.where(fits, torch.minimum(state.counts[slots], limits), 0).clamp(max=k)
    drafts, column = state.drafts[slots, :k], torch.arange(2 * k + 1, device=slots.device)
    tokens = torch.full((len(slots), 2 * k + 1), mask_id, dtype=torch.int64, device=slots.device)
    tokens[:, 0] = pending
    tokens[:, 1 : k + 1] = torch.where(column[:k] < counts[:, None], drafts, mask_id)
    clean = torch.minimum(state.clean_counts[slots], counts)
    forks = clean if branch else counts
    stored_at = seq_lens.long()[:, None] + column
    positions = torch.where(column > counts[:, None], stored_at - (counts - forks)[:, None], stored_at)
    kv = table[slots[:, None], stored_at.clamp(max=table.shape[1] - 1)].long().masked_fill(stored_at >= table.shape[1], 0)
    index = torch.where(column <= counts[:, None] + k, column, -1)
    return StepInputs(tokens, positions.clamp(max=last_position), kv, positions, index, drafts, counts, clean, forks, state.log_q[slots, :k])


def store_reference(state, slots, numbers, seq_lens, drafts, counts, clean, log_q, verified=None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`store` in plain torch."""
    k, lengths, figures = drafts.shape[1], seq_lens, None
    if verified is not None:
        lengths = seq_lens + verified.accept_lens
        figures = torch.stack([verified.counts, verified.accept_lens - 1, verified.introspection, verified.clean], dim=1)
    state.drafts[slots, :k], state.log_q[slots, :k] = drafts, log_q
    state.counts[slots], state.clean_counts[slots], state.numbers[slots] = counts.long(), clean.long(), numbers.long()
    state.lengths[slots] = lengths.long()
    return lengths, figures
