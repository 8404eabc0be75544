"""Top-k, top-p and min-p without a sort: the edge of a row's support, and a token from what is inside.

The joint rule and the tie rule are those of `isd.target.support`. In the order of falling probability, lower ids first, a token stays while its rank
is below top_k, the mass before it is at most top_p, and it is at least min_p times the largest; the first one always stays. So the support is
all tokens above a value (the edge) and the lowest ids of those that equal it.

    cut       a value that is surely not above the edge, from the group maxima of :mod:`idlm_kernels.choose` (top-k: the k-th largest group
              maximum), from V tokens below (1 - top_p) / V having less than 1 - top_p of the mass, and from min_p itself
    collect   the tokens from the cut upwards, few in a language model's row: the second and last reading of the logits
    select    bisection over the 31 bits of a probability for the edge, over the ids for ties, and the draw, among those tokens; over the whole
              row where they are more than `CAPACITY`

Mass is counted in units of 2^-53, an integer: a sum that no order changes. So the edge is a function of the row's probabilities alone.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from idlm_kernels.choose import Draws, splits_for
from idlm_kernels.noise import STREAM_TOKEN, gumbel_of, gumbel_reference, row_keys, token_bits
from idlm_kernels.rows import BLOCK, EXACT, WARPS, Rows, Sampling, row_logits, row_start, sampling_of, tempered

# Tokens per row that select handles without reading the row again.
CAPACITY = 4096
SELECT_BLOCK = 1024
# How far rounded probabilities may be from adding up to 1.
SLACK = 1e-4


@triton.jit
def probability(x, temperature, top, log_sum):
    """p before truncation, always by these operations: it is compared for equality."""
    return tl.exp((tempered(x, temperature) - top) - log_sum)


@triton.jit
def bits_of(p):
    """The int32 of a float32 >= 0: the order is the same."""
    return p.to(tl.int32, bitcast=True)


@triton.jit
def units(p):
    """Mass in units of 2^-53, rounded down."""
    return (p * 9007199254740992.0).to(tl.int64)


@triton.jit
def log_p_of(y, tokens, top, log_sum, edge, tie, log_kept):
    """log p of tokens with x / T = y under a row's law; -inf outside its support. ``edge``, ``tie`` and ``log_kept`` may be None."""
    log_p = (y - top) - log_sum
    if edge is not None:
        p = tl.exp(log_p)
        log_p = tl.where((p > edge) | ((p == edge) & (tokens <= tie)), log_p - log_kept, -float("inf"))
    return log_p


@triton.jit
def _cut(
    index, temperature, top_k, top_p, min_p, top, log_sum, group_top, cut, found, vocab, columns, groups, SLACK: tl.constexpr, GROUPS: tl.constexpr
):
    row = tl.program_id(0)
    tl.store(found + row, 0)
    if tl.load(index + row) < 0:
        return
    request = row // columns
    t, greedy, truncated = sampling_of(request, temperature, top_k, top_p, min_p, vocab)
    if truncated == 0:
        return
    highest, total = tl.load(top + row), tl.load(log_sum + row)
    peak = tl.exp((highest - highest) - total)
    value = peak * tl.load(min_p + request)
    nucleus = tl.load(top_p + request)
    if nucleus < 1.0:
        value = tl.maximum(value, (1.0 - nucleus - SLACK) / vocab)
    k = tl.load(top_k + request)
    if k <= groups:
        group = tl.arange(0, GROUPS)
        x = tl.load(group_top + row.to(tl.int64) * groups + group, mask=group < groups, other=-float("inf"))
        keys = tl.where(group < groups, bits_of(probability(x, t, highest, total)), -1)
        low, high = 0, bits_of(peak)
        while low < high:
            middle = high - (high - low) // 2
            enough = tl.sum((keys >= middle).to(tl.int32)) >= k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        value = tl.maximum(value, low.to(tl.float32, bitcast=True))
    tl.store(cut + row, tl.minimum(value, peak))


@triton.jit
def _collect(
    logits, stride_b, stride_w, bias, bitmask, width, vocab, index, temperature, top_k, top_p, min_p, top, log_sum, cut, found, keys, ids,
    columns, blocks, CAPACITY: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0), tl.program_id(1)
    number = tl.load(index + row)
    if number < 0:
        return
    request = row // columns
    t, greedy, truncated = sampling_of(request, temperature, top_k, top_p, min_p, vocab)
    if truncated == 0:
        return
    at, bias, bitmask = row_start(logits, stride_b, stride_w, bias, bitmask, width, vocab, request, number)
    highest, total, least = tl.load(top + row), tl.load(log_sum + row), tl.load(cut + row)
    per_split = tl.cdiv(blocks, SPLITS)
    for block in range(split * per_split, tl.minimum((split + 1) * per_split, blocks)):
        tokens = block * BLOCK + tl.arange(0, BLOCK)
        p = probability(row_logits(at, bias, bitmask, tokens, tokens < vocab), t, highest, total)
        inside = ((p >= least) & (tokens < vocab)).to(tl.int32)
        count = tl.sum(inside)
        if count > 0:
            place = tl.atomic_add(found + row, count) + tl.cumsum(inside) - 1
            fits = (inside != 0) & (place < CAPACITY)
            tl.store(keys + row.to(tl.int64) * CAPACITY + place, bits_of(p), mask=fits)
            tl.store(ids + row.to(tl.int64) * CAPACITY + place, tokens, mask=fits)


@triton.jit
def _candidates(whole, start, length, keys, ids, at, bias, bitmask, vocab, t, highest, total, BLOCK: tl.constexpr):
    """Keys and ids of a block of the collected tokens, or of the row's; -1 behind the end."""
    place = start + tl.arange(0, BLOCK)
    inside = place < length
    if whole:
        tokens = place
        key = bits_of(probability(row_logits(at, bias, bitmask, tokens, inside), t, highest, total))
    else:
        tokens = tl.load(ids + place, mask=inside, other=0)
        key = tl.load(keys + place, mask=inside, other=0)
    return tl.where(inside, key, -1), tokens


@triton.jit
def _select(
    logits, stride_b, stride_w, bias, bitmask, width, vocab, index, positions, temperature, top_k, top_p, min_p, seeds,
    top, log_sum, cut, found, keys, ids, tokens_out, log_p_out, edge_out, tie_out, log_kept_out, columns,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    number = tl.load(index + row)
    request = row // columns
    t, greedy, truncated = sampling_of(request, temperature, top_k, top_p, min_p, vocab)
    if (number < 0) | (truncated == 0):
        tl.store(edge_out + row, -1.0)
        tl.store(tie_out + row, -1)
        tl.store(log_kept_out + row, 0.0)
        return
    at, bias, bitmask = row_start(logits, stride_b, stride_w, bias, bitmask, width, vocab, request, number)
    keys += row.to(tl.int64) * CAPACITY
    ids += row.to(tl.int64) * CAPACITY
    highest, total = tl.load(top + row), tl.load(log_sum + row)
    collected = tl.load(found + row)
    whole = collected > CAPACITY
    length = tl.where(whole, vocab, collected)

    peak = tl.exp((highest - highest) - total)
    ratio = tl.load(min_p + request)
    floor = bits_of(tl.minimum(peak * ratio, peak))
    k = tl.maximum(tl.load(top_k + request), 1)
    nucleus = tl.load(top_p + request)
    budget = tl.where(nucleus < 1.0, units(tl.minimum(nucleus, 1.0)), 4611686018427387904)

    # The least value at which rank and mass of a token still allow it. Nothing below the cut can be it.
    low, high = bits_of(tl.load(cut + row)), bits_of(peak)
    while low < high:
        middle = low + (high - low) // 2
        count, mass = tl.zeros((), tl.int32), tl.zeros((), tl.int64)
        for start in range(0, length, BLOCK):
            key, tokens = _candidates(whole, start, length, keys, ids, at, bias, bitmask, vocab, t, highest, total, BLOCK)
            above = key > middle
            count += tl.sum(above.to(tl.int32))
            mass += tl.sum(tl.where(above, units(key.to(tl.float32, bitcast=True)), 0))
        fits = (count < k) & (mass <= budget) & (middle >= floor)
        low = tl.where(fits, low, middle + 1)
        high = tl.where(fits, middle, high)

    count, mass, equal = tl.zeros((), tl.int32), tl.zeros((), tl.int64), tl.zeros((), tl.int32)
    for start in range(0, length, BLOCK):
        key, tokens = _candidates(whole, start, length, keys, ids, at, bias, bitmask, vocab, t, highest, total, BLOCK)
        count += tl.sum((key > high).to(tl.int32))
        mass += tl.sum(tl.where(key > high, units(key.to(tl.float32, bitcast=True)), 0))
        equal += tl.sum((key == high).to(tl.int32))
    unit = units(high.to(tl.float32, bitcast=True))
    by_mass = tl.where(unit > 0, (budget - mass) // tl.maximum(unit, 1) + 1, vocab)
    allowed = tl.minimum((k - count).to(tl.int64), by_mass)
    allowed = tl.where(ratio > 1.0, 1, allowed)
    first, last = 0, vocab - 1
    if equal <= allowed:
        first = last
    while first < last:
        middle = first + (last - first) // 2
        within = tl.zeros((), tl.int32)
        for start in range(0, length, BLOCK):
            key, tokens = _candidates(whole, start, length, keys, ids, at, bias, bitmask, vocab, t, highest, total, BLOCK)
            within += tl.sum(((key == high) & (tokens <= middle)).to(tl.int32))
        enough = within >= allowed
        first = tl.where(enough, first, middle + 1)
        last = tl.where(enough, middle, last)

    low_key, high_key = row_keys(tl.load(seeds + request), tl.load(positions + row), STREAM_TOKEN)
    best, chosen, kept_mass = -float("inf"), vocab, tl.zeros((), tl.int64)
    for start in range(0, length, BLOCK):
        key, tokens = _candidates(whole, start, length, keys, ids, at, bias, bitmask, vocab, t, highest, total, BLOCK)
        kept = (key > high) | ((key == high) & (tokens <= last))
        kept_mass += tl.sum(tl.where(kept, units(key.to(tl.float32, bitcast=True)), 0))
        y = tempered(row_logits(at, bias, bitmask, tokens, kept), t)
        score = tl.where(kept, y + gumbel_of(token_bits(low_key, high_key, tokens)), -float("inf"))
        higher = tl.max(score)
        token = tl.min(tl.where(score == higher, tokens, vocab))
        if (higher > best) | ((higher == best) & (token < chosen)):
            best = higher
            chosen = token
    chosen = tl.where(best == -float("inf"), 0, chosen)
    log_kept = tl.log(kept_mass.to(tl.float32) * 1.1102230246251565e-16)
    y = tempered(row_logits(at, bias, bitmask, chosen, chosen < vocab), t)
    tl.store(tokens_out + row, chosen.to(tl.int64))
    tl.store(log_p_out + row, ((y - highest) - total) - log_kept)
    tl.store(edge_out + row, high.to(tl.float32, bitcast=True))
    tl.store(tie_out + row, last)
    tl.store(log_kept_out + row, log_kept)


def truncate(
    rows: Rows, sampling: Sampling, draws: Draws, splits: int | None = None, capacity: int = CAPACITY, block: int = BLOCK, select_block: int = SELECT_BLOCK
) -> Draws:
    """The draws with the truncated requests' tokens, supports and log-probabilities; the other rows' stay.

    Args:
        draws: from :func:`idlm_kernels.choose.choose` on the same rows; changed in place.
        splits: programs per row that collect. capacity: collected tokens per row, ``B x R x capacity x 8`` bytes. No result depends on these or the blocks.
    """
    if not sampling.any_truncated:
        return draws
    batch, _, columns, vocab = rows.shape
    total, device = batch * columns, rows.logits.device
    groups, blocks = draws.group_top.shape[-1], triton.cdiv(vocab, block)
    splits = splits or splits_for(total, blocks)
    cut, found = torch.empty(total, device=device), torch.empty(total, dtype=torch.int32, device=device)
    keys, ids = (torch.empty(total, capacity, dtype=torch.int32, device=device) for _ in range(2))
    edge, log_kept = torch.empty(batch, columns, device=device), torch.empty(batch, columns, device=device)
    tie = torch.empty(batch, columns, dtype=torch.int32, device=device)
    parameters = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    law = (draws.top, draws.log_sum)
    if total:
        _cut[(total,)](
            rows.index, *parameters, *law, draws.group_top, cut, found, vocab, columns, groups,
            SLACK=SLACK, GROUPS=triton.next_power_of_2(groups), num_warps=4, **EXACT,
        )  # fmt: skip
        _collect[(total, splits)](
            *rows.pointers, rows.index, *parameters, *law, cut, found, keys, ids, columns, blocks,
            CAPACITY=capacity, SPLITS=splits, BLOCK=block, num_warps=WARPS, **EXACT,
        )  # fmt: skip
        _select[(total,)](
            *rows.pointers, rows.index, rows.positions, *parameters, sampling.seed, *law, cut, found, keys, ids,
            draws.tokens, draws.log_p, edge, tie, log_kept, columns, CAPACITY=capacity, BLOCK=select_block, num_warps=WARPS, **EXACT,
        )  # fmt: skip
    return replace(draws, edge=edge, tie=tie, log_kept=log_kept)


def support_reference(p: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """``(B, R, V)`` bool: the joint rule by a stable sort, from probabilities ``(B, R, V)`` float32 and parameters ``(B,)``."""
    ordered, order = torch.sort(p, dim=-1, descending=True, stable=True)
    before = ordered.double().cumsum(-1) - ordered.double()
    rank = torch.arange(p.shape[-1], device=p.device)
    k, nucleus, ratio = (part[:, None, None] for part in (top_k, top_p, min_p))
    keep = (rank < k) & ((before <= nucleus) | (nucleus >= 1)) & (ordered >= ordered[..., :1] * ratio)
    keep[..., 0] = True
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def truncate_reference(rows: Rows, sampling: Sampling, draws: Draws) -> tuple[torch.Tensor, Draws]:
    """(supports ``(B, R, V)`` bool, draws) in plain torch, from the same ``top`` and ``log_sum``; no edge."""
    vocab = rows.logits.shape[-1]
    greedy = sampling.top_k <= 1
    truncated = ((sampling.top_k < vocab) | (sampling.top_p < 1) | (sampling.min_p > 0)) & ~greedy
    y = rows.read() / torch.where(greedy, 1.0, sampling.temperature)[:, None, None]
    log_p = (y - draws.top[..., None]) - draws.log_sum[..., None]
    keep = support_reference(log_p.exp(), sampling.top_k, sampling.top_p, sampling.min_p) | ~truncated[:, None, None]
    log_kept = torch.where(keep, log_p.exp(), 0).double().sum(-1).log().float()
    noisy = (y + gumbel_reference(sampling.seed, rows.positions, vocab)[0]).masked_fill(~keep, float("-inf"))
    mine = truncated[:, None] & (rows.index >= 0)
    tokens = torch.where(mine, noisy.argmax(-1), draws.tokens)
    chosen = log_p.gather(-1, tokens[..., None])[..., 0] - log_kept
    return keep, replace(draws, tokens=tokens, log_p=torch.where(mine, chosen, draws.log_p), log_kept=torch.where(mine, log_kept, 0.0))
