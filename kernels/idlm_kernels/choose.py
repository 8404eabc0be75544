"""One token of every row that is read, in one pass over its logits.

A greedy request takes the largest logit, a sampled one argmax(x / T + g) with the keyed noise of :mod:`idlm_kernels.noise`, which is a draw from
softmax(x / T). Equal values go to the lower token id. The maximum and the logarithm of the sum of exponentials come from the same pass.

The reference (`isd.step`) adds the noise to log p instead of x / T. Both sums round, so two tokens whose scores differ by less than about
2^-22 times their size can change places; nothing else differs. A token's score here does not depend on the rest of the row, so the draw is the
same at any number of splits.

Two launches: blocks of the vocabulary, spread over ``splits`` programs a row, and one small program a row that joins them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from idlm_kernels.noise import STREAM_TOKEN, gumbel_of, gumbel_reference, row_keys, token_bits, unit_below
from idlm_kernels.rows import BLOCK, EXACT, WARPS, Rows, Sampling, finite, row_logits, row_start, sampling_of, tempered

# Tokens whose largest logit is kept for the search of a top-k edge.
GROUP = 128
# Programs of the first launch that fill a GPU, and the most per row. Candidates for `benchmarks.kernels choose` on a GPU.
PROGRAMS = 132 * 8
SPLITS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Draws:
    """What is known of ``(B, R)`` rows. Columns without a row hold zeros.

    Attributes:
        tokens: int64. log_p: float32, log of the token's probability; 0 for a greedy request.
        top: float32, the largest x / T (T = 1 where greedy). log_sum: float32, log of the sum of exp(x / T - top) over the vocabulary.
        group_top: ``(B, R, G)`` float32, largest logit of each group of tokens of truncated requests, or None.
        edge, tie, log_kept: ``(B, R)`` float32, int32, float32 from :func:`idlm_kernels.truncate.truncate`, or None where nothing is truncated.
            With p(v) = exp((x / T - top) - log_sum), token v is kept where p(v) > edge, or p(v) = edge and v <= tie; log_kept is
            the logarithm of the mass of the kept tokens.
    """

    tokens: torch.Tensor
    log_p: torch.Tensor
    top: torch.Tensor
    log_sum: torch.Tensor
    group_top: torch.Tensor | None = None
    edge: torch.Tensor | None = None
    tie: torch.Tensor | None = None
    log_kept: torch.Tensor | None = None

    @property
    def law(self) -> tuple:
        """What determines each row's distribution, as the kernels take it."""
        return self.top, self.log_sum, self.edge, self.tie, self.log_kept


@triton.jit
def _scan(
    logits, stride_b, stride_w, bias, bitmask, width, vocab, index, positions, temperature, top_k, top_p, min_p, seeds,
    block_top, block_sum, split_best, split_token, group_top, columns, blocks, groups,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0), tl.program_id(1)
    number = tl.load(index + row)
    if number < 0:
        return
    request = row // columns
    t, greedy, truncated = sampling_of(request, temperature, top_k, top_p, min_p, vocab)
    at, bias, bitmask = row_start(logits, stride_b, stride_w, bias, bitmask, width, vocab, request, number)
    first, second = row_keys(tl.load(seeds + request), tl.load(positions + row), STREAM_TOKEN)
    best = -float("inf")
    token = 0
    per_split = tl.cdiv(blocks, SPLITS)
    for block in range(split * per_split, tl.minimum((split + 1) * per_split, blocks)):
        tokens = block * BLOCK + tl.arange(0, BLOCK)
        x = row_logits(at, bias, bitmask, tokens, tokens < vocab)
        highest = tl.max(x)
        y = x
        if t != 1.0:
            y = tempered(x, t)
        top = tempered(highest, t)
        e = tl.exp(y - finite(top))
        tl.store(block_top + row * blocks + block, top)
        tl.store(block_sum + row * blocks + block, tl.sum(e))
        if group_top is not None:
            if truncated:
                group = block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
                peaks = tl.max(tl.reshape(x, (BLOCK // GROUP, GROUP)), axis=1)
                tl.store(group_top + row.to(tl.int64) * groups + group, peaks, mask=group < groups)
        if greedy | truncated:
            if highest > best:
                best = highest
                token = tl.min(tl.where(x == highest, tokens, vocab))
        else:
            bits = token_bits(first, second, tokens)
            # y + g beats the best only if -log(1 - u) < exp(y - best), and u is below that. Few blocks pass, and only they pay for
            # the two logarithms; the factor covers every rounding.
            bound = tl.exp(finite(top) - best) * 1.01
            if tl.max(((e > 0) & (unit_below(bits) <= e * bound)).to(tl.int32)) > 0:
                score = y + gumbel_of(bits)
                higher = tl.max(score)
                if higher > best:
                    best = higher
                    token = tl.min(tl.where(score == higher, tokens, vocab))
    tl.store(split_best + row * SPLITS + split, best)
    tl.store(split_token + row * SPLITS + split, token)


@triton.jit
def _join(
    logits, stride_b, stride_w, bias, bitmask, width, vocab, index, temperature, top_k, top_p, min_p,
    block_top, block_sum, split_best, split_token, tokens_out, log_p_out, top_out, log_sum_out, columns, blocks,
    SPLITS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    number = tl.load(index + row)
    if number < 0:
        tl.store(tokens_out + row, 0)
        tl.store(log_p_out + row, 0.0)
        tl.store(top_out + row, 0.0)
        tl.store(log_sum_out + row, 0.0)
        return
    request = row // columns
    t, greedy, truncated = sampling_of(request, temperature, top_k, top_p, min_p, vocab)
    block = tl.arange(0, BLOCKS)
    tops = tl.load(block_top + row * blocks + block, mask=block < blocks, other=-float("inf"))
    sums = tl.load(block_sum + row * blocks + block, mask=block < blocks, other=0.0)
    top = tl.max(tops)
    log_sum = tl.log(tl.sum(sums * tl.exp(tops - finite(top))))
    split = tl.arange(0, SPLITS)
    bests = tl.load(split_best + row * SPLITS + split)
    token = tl.min(tl.where(bests == tl.max(bests), tl.load(split_token + row * SPLITS + split), vocab - 1))
    at, bias, bitmask = row_start(logits, stride_b, stride_w, bias, bitmask, width, vocab, request, number)
    y = tempered(row_logits(at, bias, bitmask, token, token >= 0), t)
    tl.store(tokens_out + row, token.to(tl.int64))
    tl.store(log_p_out + row, tl.where(greedy, 0.0, (y - top) - log_sum))
    tl.store(top_out + row, top)
    tl.store(log_sum_out + row, log_sum)


def splits_for(rows: int, blocks: int) -> int:
    """Programs per row: enough to fill a GPU, no more than there are blocks."""
    return next((s for s in SPLITS if s * rows >= PROGRAMS or 2 * s > blocks), SPLITS[-1])


def choose(rows: Rows, sampling: Sampling, splits: int | None = None, block: int = BLOCK) -> Draws:
    """Draw a token from every row that is read.

    A truncated request (top-k, top-p, min-p) gets its row statistics here and its token from :func:`idlm_kernels.truncate.truncate`.

    Args:
        splits: programs per row, a power of two; by default from the number of rows. No result depends on it.
        block: tokens a program handles at a time, a power of two >= 128; the last bits of log_sum depend on it.
    """
    batch, _, columns, vocab = rows.shape
    total, device = batch * columns, rows.logits.device
    blocks, groups = triton.cdiv(vocab, block), triton.cdiv(vocab, GROUP)
    splits = splits or splits_for(total, blocks)
    f32 = dict(dtype=torch.float32, device=device)
    block_top, block_sum = torch.empty(total, blocks, **f32), torch.empty(total, blocks, **f32)
    split_best, split_token = torch.empty(total, splits, **f32), torch.empty(total, splits, dtype=torch.int32, device=device)
    group_top = torch.empty(batch, columns, groups, **f32) if sampling.any_truncated else None
    tokens = torch.empty(batch, columns, dtype=torch.int64, device=device)
    log_p, top, log_sum = (torch.empty(batch, columns, **f32) for _ in range(3))
    parameters = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    if total:
        _scan[(total, splits)](
            *rows.pointers, rows.index, rows.positions, *parameters, sampling.seed, block_top, block_sum, split_best, split_token,
            group_top, columns, blocks, groups, SPLITS=splits, BLOCK=block, GROUP=GROUP, num_warps=WARPS, **EXACT,
        )  # fmt: skip
        _join[(total,)](
            *rows.pointers, rows.index, *parameters, block_top, block_sum, split_best, split_token, tokens, log_p, top, log_sum,
            columns, blocks, SPLITS=splits, BLOCKS=triton.next_power_of_2(blocks), num_warps=1, **EXACT,
        )  # fmt: skip
    return Draws(tokens, log_p, top, log_sum, group_top)


def choose_reference(rows: Rows, sampling: Sampling) -> Draws:
    """:func:`choose` in plain torch, without the group maxima."""
    vocab = rows.logits.shape[-1]
    x, read = rows.read(), rows.index >= 0
    greedy = (sampling.top_k <= 1)[:, None]
    truncated = (sampling.top_k < vocab) | (sampling.top_p < 1) | (sampling.min_p > 0)
    y = x / torch.where(greedy, 1.0, sampling.temperature[:, None])[..., None]
    noisy = y + gumbel_reference(sampling.seed, rows.positions, vocab)[0]
    tokens = torch.where(greedy | truncated[:, None], x.argmax(-1), noisy.argmax(-1))
    top = y.amax(-1)
    log_sum = torch.exp(y - torch.where(top == float("-inf"), 0.0, top)[..., None]).sum(-1).log()
    log_p = torch.where(greedy, 0.0, (y.gather(-1, tokens[..., None])[..., 0] - top) - log_sum)
    return Draws(*(torch.where(read, part, 0) for part in (tokens, log_p, top, log_sum)))
