"""Rows' distributions written out: the q of the next drafts, straight into the slots that keep them.

Only requests of the rejection rule need a q. Its K rows are written where the state keeps them, ``out[slot, j]``, in one pass over the logits.
"""

import torch
import triton
import triton.language as tl

from idlm_kernels.choose import Draws
from idlm_kernels.rows import BLOCK, EXACT, WARPS, Rows, Sampling, row_logits, row_start, sampling_of, tempered
from idlm_kernels.truncate import log_p_of
from idlm_kernels.verify import law_reference


@triton.jit
def _write(
    logits, stride_b, stride_w, bias, bitmask, width, vocab, index, top, log_sum, edge, tie, log_kept,
    coupled, temperature, top_k, top_p, min_p, source, columns, out, stride_slot, stride_out, slots, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request, j = tl.program_id(0) // K, tl.program_id(0) % K
    t, greedy, truncated = sampling_of(request, temperature, top_k, top_p, min_p, vocab)
    if greedy | (tl.load(coupled + request) != 0):
        return
    row = request * columns + tl.load(source + request * K + j)
    number = tl.load(index + row)
    if number < 0:
        return
    at, bias, bitmask = row_start(logits, stride_b, stride_w, bias, bitmask, width, vocab, request, number)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tempered(row_logits(at, bias, bitmask, tokens, tokens < vocab), t)
    if edge is not None:
        log_p = log_p_of(y, tokens, tl.load(top + row), tl.load(log_sum + row), tl.load(edge + row), tl.load(tie + row), tl.load(log_kept + row))
    else:
        log_p = log_p_of(y, tokens, tl.load(top + row), tl.load(log_sum + row), None, None, None)
    place = tl.load(slots + request).to(tl.int64) * stride_slot + j * stride_out
    tl.store(out + place + tokens, tl.exp(log_p), mask=tokens < vocab)


def store_q(rows: Rows, sampling: Sampling, draws: Draws, source: torch.Tensor, out: torch.Tensor, slots: torch.Tensor, block: int = BLOCK) -> None:
    """``out[slots[b], j] = p`` of column ``source[b, j]``, for the sampled requests of the rejection rule.

    Args:
        source: ``(B, K)`` int32, contiguous: `Verified.columns`.
        out: ``(S, K', V)`` float32, ``K' >= K``, unit stride along V. slots: ``(B,)`` integer, each at most once.
    """
    batch, _, columns, vocab = rows.shape
    k = source.shape[1]
    if not batch or not k or not sampling.any_rejection:
        return
    _write[(batch * k, triton.cdiv(vocab, block))](
        *rows.pointers, rows.index, *draws.law, sampling.coupled.view(torch.uint8), sampling.temperature, sampling.top_k, sampling.top_p,
        sampling.min_p, source, columns, out, out.stride(0), out.stride(1), slots, K=k, BLOCK=block, num_warps=WARPS, **EXACT,
    )  # fmt: skip


def store_q_reference(rows: Rows, sampling: Sampling, draws: Draws, source: torch.Tensor, out: torch.Tensor, slots: torch.Tensor) -> None:
    """:func:`store_q` in plain torch, one request at a time."""
    p = law_reference(rows, sampling, draws).exp()
    for b in range(len(slots)):
        if int(sampling.top_k[b]) > 1 and not bool(sampling.coupled[b]):
            out[int(slots[b]), : source.shape[1]] = p[b, source[b].long()]
