"""From draws and drafts to committed tokens and the next drafts, by both exact rules.

    matching (greedy and coupled)   a draft stands where its row drew the same token; the first row that drew another one decides
    rejection                       a draft x stands where u < p(x) / q(x); at the first that falls max(0, p - q) decides, behind the last one p

Column i of the draws is row i: 0..c verify (c drafts), c + 1..c + K propose (:func:`idlm_kernels.rows.step_rows`). Which of them give the next
drafts is `isd.propose`'s rule: entries j + 1..j + K of the spine (rows 0..f, then the proposing ones) behind j accepted drafts.

Matching is one launch, one program per request. Rejection is two: the deciding row and its q are read once, spread over several programs per request,
which draw from max(0, p - q) and from p at the same time (p where p - q leaves nothing, and behind the last draft); the second launch joins them.
q is read where the slots keep it, without a copy, and not at all where every draft stands.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from idlm_kernels.choose import Draws
from idlm_kernels.noise import STREAM_ACCEPT, STREAM_FINAL, gumbel_of, gumbel_reference, row_keys, token_bits, uniform_of, uniform_reference
from idlm_kernels.rows import BLOCK, EXACT, WARPS, Rows, Sampling, row_logits, row_start, sampling_of, tempered
from idlm_kernels.truncate import log_p_of

RESIDUAL_SPLITS = 16


@dataclass(frozen=True)
class Verified:
    """Of one step.

    Attributes:
        tokens: ``(B, K + 1)`` int64, of which the first ``accept_lens`` are committed. accept_lens: ``(B,)`` int32.
        last: ``(B,)`` int64, the last committed token. deciding: ``(B,)`` int64, the row that gave it.
        introspection: ``(B,)`` float32, the sum of min(1, p / q) over the drafts that were tried.
        drafts: ``(B, K)`` int64, the next ones; counts, clean: ``(B,)`` int64, how many of them are valid, and how many are no survivors.
        log_q: ``(B, K)`` float32. columns: ``(B, K)`` int32, the column that each of them is from.
    """

    tokens: torch.Tensor
    accept_lens: torch.Tensor
    last: torch.Tensor
    deciding: torch.Tensor
    introspection: torch.Tensor
    drafts: torch.Tensor
    counts: torch.Tensor
    clean: torch.Tensor
    log_q: torch.Tensor
    columns: torch.Tensor


@triton.jit
def _draft_log_p(
    logits, stride_b, stride_w, bias, bitmask, width, vocab, index, top, log_sum, edge, tie, log_kept, request, column, columns, draft, temperature
):
    """log p of one draft under the row of ``column``."""
    row = request * columns + column
    at, bias, bitmask = row_start(logits, stride_b, stride_w, bias, bitmask, width, vocab, request, tl.load(index + row))
    y = tempered(row_logits(at, bias, bitmask, draft, (draft >= 0) & (draft < vocab)), temperature)
    if edge is not None:
        return log_p_of(y, draft, tl.load(top + row), tl.load(log_sum + row), tl.load(edge + row), tl.load(tie + row), tl.load(log_kept + row))
    return log_p_of(y, draft, tl.load(top + row), tl.load(log_sum + row), None, None, None)


@triton.jit
def _accepted(
    logits, stride_b, stride_w, bias, bitmask, width, vocab, index, top, log_sum, edge, tie, log_kept,
    positions, seeds, drafts, drawn, q, stride_slot, stride_q, q_rows, count, by_rejection, request, columns, temperature, K: tl.constexpr,
):  # fmt: skip
    """How many drafts stand."""
    run, standing = 0, 1
    for i in tl.static_range(K):
        if (standing != 0) & (i < count):
            draft = tl.load(drafts + request * K + i)
            stands = tl.load(drawn + request * columns + i) == draft
            if q is not None:
                if by_rejection:
                    log_p = _draft_log_p(
                        logits, stride_b, stride_w, bias, bitmask, width, vocab, index, top, log_sum, edge, tie, log_kept,
                        request, i, columns, draft, temperature,
                    )  # fmt: skip
                    u = uniform_of(tl.load(seeds + request), tl.load(positions + request * columns + i), STREAM_ACCEPT)
                    stands = u * tl.load(q + tl.load(q_rows + request) * stride_slot + i * stride_q + draft) < tl.exp(log_p)
            standing = stands.to(tl.int32)
            run += standing
        else:
            standing = 0
    return run


@triton.jit
def _residual(
    logits, stride_b, stride_w, bias, bitmask, width, vocab, index, top, log_sum, edge, tie, log_kept,
    positions, seeds, drafts, drawn, q, stride_slot, stride_q, q_rows, counts, coupled, temperature, top_k, top_p, min_p, bests, chosen, columns,
    blocks, K: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request, split = tl.program_id(0), tl.program_id(1)
    t, greedy, truncated = sampling_of(request, temperature, top_k, top_p, min_p, vocab)
    if greedy | (tl.load(coupled + request) != 0):
        return
    count = tl.load(counts + request)
    run = _accepted(
        logits, stride_b, stride_w, bias, bitmask, width, vocab, index, top, log_sum, edge, tie, log_kept,
        positions, seeds, drafts, drawn, q, stride_slot, stride_q, q_rows, count, True, request, columns, t, K,
    )  # fmt: skip
    row = request * columns + run
    at, bias, bitmask = row_start(logits, stride_b, stride_w, bias, bitmask, width, vocab, request, tl.load(index + row))
    highest, total = tl.load(top + row), tl.load(log_sum + row)
    q_at = q + tl.load(q_rows + request) * stride_slot + run * stride_q
    rejected = run < count
    first, second = row_keys(tl.load(seeds + request), tl.load(positions + row), STREAM_FINAL)
    best_left, best_p = -float("inf"), -float("inf")
    token_left, token_p = 0, 0
    per_split = tl.cdiv(blocks, SPLITS)
    for block in range(split * per_split, tl.minimum((split + 1) * per_split, blocks)):
        tokens = block * BLOCK + tl.arange(0, BLOCK)
        y = tempered(row_logits(at, bias, bitmask, tokens, tokens < vocab), t)
        if edge is not None:
            log_p = log_p_of(y, tokens, highest, total, tl.load(edge + row), tl.load(tie + row), tl.load(log_kept + row))
        else:
            log_p = log_p_of(y, tokens, highest, total, None, None, None)
        g = gumbel_of(token_bits(first, second, tokens))
        score = log_p + g
        higher = tl.max(score)
        if higher > best_p:
            best_p = higher
            token_p = tl.min(tl.where(score == higher, tokens, vocab))
        if rejected:
            left = tl.maximum(tl.exp(log_p) - tl.load(q_at + tokens, mask=tokens < vocab, other=0.0), 0.0)
            score = tl.where(left > 0.0, tl.log(left) + g, -float("inf"))
            higher = tl.max(score)
            if higher > best_left:
                best_left = higher
                token_left = tl.min(tl.where(score == higher, tokens, vocab))
    place = (request * SPLITS + split) * 2
    tl.store(bests + place, best_left)
    tl.store(bests + place + 1, best_p)
    tl.store(chosen + place, token_left)
    tl.store(chosen + place + 1, token_p)


@triton.jit
def _commit(
    logits, stride_b, stride_w, bias, bitmask, width, vocab, index, top, log_sum, edge, tie, log_kept,
    positions, seeds, drafts, drawn, q, stride_slot, stride_q, q_rows, counts, coupled, temperature, top_k, top_p, min_p, bests, chosen, columns,
    drawn_log_p, log_q, limits, forks, tokens_out, lens_out, last_out, deciding_out, introspection_out, drafts_out, counts_out, clean_out,
    log_q_out, columns_out, K: tl.constexpr, SPLITS: tl.constexpr, SALVAGE: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    t, greedy, truncated = sampling_of(request, temperature, top_k, top_p, min_p, vocab)
    by_rejection = (greedy == 0) & (tl.load(coupled + request) == 0)
    count = tl.load(counts + request).to(tl.int32)
    run = _accepted(
        logits, stride_b, stride_w, bias, bitmask, width, vocab, index, top, log_sum, edge, tie, log_kept,
        positions, seeds, drafts, drawn, q, stride_slot, stride_q, q_rows, count, by_rejection, request, columns, t, K,
    )  # fmt: skip
    last = tl.load(drawn + request * columns + run)
    if bests is not None:
        if by_rejection:
            split = (request * SPLITS + tl.arange(0, SPLITS)) * 2
            left, p = tl.load(bests + split), tl.load(bests + split + 1)
            best_left = tl.max(left)
            by_left = tl.min(tl.where(left == best_left, tl.load(chosen + split), vocab - 1))
            by_p = tl.min(tl.where(p == tl.max(p), tl.load(chosen + split + 1), vocab - 1))
            last = tl.where(best_left > -float("inf"), by_left, by_p).to(tl.int64)

    fork = count
    if forks is not None:
        fork = tl.load(forks + request).to(tl.int32)
    behind = fork
    if SALVAGE:
        behind = run
    introspection = 0.0
    for i in tl.static_range(K):
        tl.store(tokens_out + request * (K + 1) + i, tl.where(i < run, tl.load(drafts + request * K + i), last))
        if (i < count) & (i <= run):
            draft = tl.load(drafts + request * K + i)
            if greedy:
                introspection += (tl.load(drawn + request * columns + i) == draft).to(tl.float32)
            else:
                log_p = _draft_log_p(
                    logits, stride_b, stride_w, bias, bitmask, width, vocab, index, top, log_sum, edge, tie, log_kept,
                    request, i, columns, draft, t,
                )  # fmt: skip
                # -inf of -inf is no number, which a minimum on a GPU would hide.
                delta = log_p - tl.load(log_q + request * K + i)
                introspection += tl.where(delta == delta, tl.exp(tl.minimum(delta, 0.0)), 0.0)
        # Entries behind the spine's end are not counted; they only have to be some column.
        entry = behind + 1 + i
        column = tl.minimum(tl.where(entry <= fork, entry, count + entry - fork), count + K)
        tl.store(columns_out + request * K + i, column)
        tl.store(drafts_out + request * K + i, tl.load(drawn + request * columns + column))
        tl.store(log_q_out + request * K + i, tl.load(drawn_log_p + request * columns + column))
    tl.store(tokens_out + request * (K + 1) + K, last)
    tl.store(lens_out + request, (run + 1).to(tl.int32))
    tl.store(last_out + request, last)
    tl.store(deciding_out + request, run.to(tl.int64))
    tl.store(introspection_out + request, introspection)
    ahead = tl.minimum(tl.load(limits + request).to(tl.int64), K - tl.maximum(run - fork, 0))
    clean = tl.where(run >= fork, ahead, 0)
    tl.store(clean_out + request, clean)
    tl.store(counts_out + request, ahead if SALVAGE else clean)


def verify(
    rows: Rows,
    sampling: Sampling,
    draws: Draws,
    drafts: torch.Tensor,
    counts: torch.Tensor,
    log_q: torch.Tensor,
    limits: torch.Tensor,
    q: torch.Tensor | None = None,
    q_rows: torch.Tensor | None = None,
    forks: torch.Tensor | None = None,
    salvage: bool = False,
    splits: int | None = None,
    block: int = BLOCK,
) -> Verified:
    """Verify a step's drafts.

    Args:
        rows: at least ``2K + 1`` columns, column i being row i of the step.
        draws: of those rows.
        drafts: ``(B, K)`` int64; counts: ``(B,)`` integer; log_q: ``(B, K)`` float32; limits: ``(B,)`` integer, as for `isd.step.isd_step`.
        q: ``(S, K', V)`` float32 probabilities the drafts were drawn from, ``K' >= K``; needed where a sampled request rejects.
        q_rows: ``(B,)`` int64, the first index into q of each request; the requests in order without it.
        forks: ``(B,)`` integer, drafts the proposing rows saw; all without it. salvage: a rejection leaves survivors.
        splits: programs per request that draw the correction, a power of two. No result depends on it.
    """
    _, _, columns, vocab = rows.shape
    batch, k = drafts.shape
    device = drafts.device
    blocks = triton.cdiv(vocab, block)
    splits = splits or min(RESIDUAL_SPLITS, triton.next_power_of_2(blocks))
    if columns < 2 * k + 1:
        raise ValueError(f"{columns} columns of draws for {k} drafts; allowed: at least {2 * k + 1}")
    rejecting = sampling.any_rejection
    if rejecting and q is None and k:
        raise ValueError("q is missing; allowed: None only where no request uses the rejection rule")
    if rejecting and q is None:
        q = torch.zeros(1, 1, 1, device=device)
    if not rejecting:
        q = None
    strides = (q.stride(0), q.stride(1)) if rejecting else (0, 0)
    if rejecting and q_rows is None:
        q_rows = torch.arange(batch, device=device)
    drafts, log_q = drafts.contiguous(), log_q.contiguous()
    int64 = dict(dtype=torch.int64, device=device)
    tokens, last, deciding = torch.empty(batch, k + 1, **int64), torch.empty(batch, **int64), torch.empty(batch, **int64)
    lens, introspection = torch.empty(batch, dtype=torch.int32, device=device), torch.empty(batch, device=device)
    next_drafts, next_counts, clean = torch.empty(batch, k, **int64), torch.empty(batch, **int64), torch.empty(batch, **int64)
    next_log_q, source = torch.empty(batch, k, device=device), torch.empty(batch, k, dtype=torch.int32, device=device)
    bests = torch.empty(batch, splits, 2, device=device) if rejecting else None
    chosen = torch.empty(batch, splits, 2, dtype=torch.int32, device=device) if rejecting else None
    shared = (
        *rows.pointers, rows.index, *draws.law, rows.positions, sampling.seed, drafts, draws.tokens, q, *strides, q_rows, counts,
        sampling.coupled.view(torch.uint8), sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, bests, chosen, columns,
    )  # fmt: skip
    if batch and rejecting:
        _residual[(batch, splits)](*shared, blocks, K=k, SPLITS=splits, BLOCK=block, num_warps=WARPS, **EXACT)
    if batch:
        _commit[(batch,)](
            *shared, draws.log_p, log_q, limits, forks, tokens, lens, last, deciding, introspection, next_drafts, next_counts, clean,
            next_log_q, source, K=k, SPLITS=splits, SALVAGE=salvage, num_warps=1, **EXACT,
        )  # fmt: skip
    return Verified(tokens, lens, last, deciding, introspection, next_drafts, next_counts, clean, next_log_q, source)


def law_reference(rows: Rows, sampling: Sampling, draws: Draws) -> torch.Tensor:
    """``(B, R, V)`` float32 log p of every row from the draws' statistics, in plain torch."""
    greedy = sampling.top_k <= 1
    y = rows.read() / torch.where(greedy, 1.0, sampling.temperature)[:, None, None]
    log_p = (y - draws.top[..., None]) - draws.log_sum[..., None]
    if draws.edge is None:
        return log_p
    p, tokens = log_p.exp(), torch.arange(y.shape[-1], device=y.device)
    keep = (p > draws.edge[..., None]) | ((p == draws.edge[..., None]) & (tokens <= draws.tie[..., None]))
    return torch.where(keep, log_p - draws.log_kept[..., None], float("-inf"))


def verify_reference(rows, sampling, draws, drafts, counts, log_q, limits, q=None, q_rows=None, forks=None, salvage=False) -> Verified:
    """:func:`verify` in plain torch, one request and one draft at a time."""
    vocab, (batch, k) = rows.logits.shape[-1], drafts.shape
    log_p = law_reference(rows, sampling, draws)
    u = uniform_reference(sampling.seed, rows.positions)
    g = gumbel_reference(sampling.seed, rows.positions, vocab, 2)[0]
    out = []
    for b in range(batch):
        greedy, count = int(sampling.top_k[b]) <= 1, int(counts[b])
        by_rejection = not greedy and not bool(sampling.coupled[b])
        mine = q[b if q_rows is None else int(q_rows[b])] if by_rejection and k else None
        run = 0
        while run < count:
            x = int(drafts[b, run])
            stands = float(u[b, run] * mine[run, x]) < float(log_p[b, run, x].exp()) if by_rejection else int(draws.tokens[b, run]) == x
            if not stands:
                break
            run += 1
        last = int(draws.tokens[b, run])
        if by_rejection:
            left = (log_p[b, run].exp() - mine[run]).clamp(min=0) if run < count else torch.zeros(vocab, device=drafts.device)
            weights = left.log() if float(left.sum()) > 0 else log_p[b, run]
            last = int((weights + g[b, run]).argmax())
        tried = range(min(run + 1, count))
        if greedy:
            introspection = sum(float(draws.tokens[b, i] == drafts[b, i]) for i in tried)
        else:
            ratios = [float((log_p[b, i, int(drafts[b, i])] - log_q[b, i]).clamp(max=0).exp()) for i in tried]
            introspection = sum(r for r in ratios if r == r)
        fork = count if forks is None else int(forks[b])
        spine = [*range(fork + 1), *range(count + 1, count + 1 + k)]
        ahead = spine[(run if salvage else fork) + 1 :][:k]
        fresh = ahead + [count + k] * (k - len(ahead))
        tokens = drafts[b, :run].tolist() + [last] * (k + 1 - run)
        most = min(int(limits[b]), k - max(run - fork, 0))
        clean = most if run >= fork else 0
        next_ = (draws.tokens[b, fresh].tolist(), most if salvage else clean, clean, draws.log_p[b, fresh].tolist(), fresh)
        out.append((tokens, run + 1, last, run, introspection, *next_))
    integer, real = torch.int64, torch.float32
    types = (integer, torch.int32, integer, integer, real, integer, integer, integer, real, torch.int32)
    return Verified(*(torch.tensor(part, dtype=dtype, device=drafts.device) for part, dtype in zip(zip(*out), types)))
