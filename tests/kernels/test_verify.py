"""Accepted runs, corrections and next drafts by both rules: against loops over the drafts, and where p, q or the rows are degenerate."""

import pytest
import torch

from idlm_kernels.choose import choose
from idlm_kernels.step import isd_step
from idlm_kernels.truncate import truncate
from idlm_kernels.verify import verify, verify_reference
from tests.isd.reference import GREEDY, NEG, Params
from tests.kernels.common import MIXED, parameters, random_logits, rows_of

EXACT = ("tokens", "accept_lens", "last", "deciding", "drafts", "counts", "clean", "columns")


def step_of(params, k, vocab, seed, device, near=0.4, branch=False):
    """Rows, sampling, draws and drafts from a q near p, with zeros in it; what is behind a request's count is NaN or out of range."""
    batch, random = len(params), torch.Generator().manual_seed(seed)
    logits = random_logits(batch, 2 * k + 1, vocab, seed, "cpu")
    q = torch.softmax(logits[:, :k] + torch.randn(batch, k, vocab, generator=random) * near, -1)
    q = q.masked_fill(torch.rand(q.shape, generator=random) < 0.2, 0)
    q[..., 0] += 1e-3
    drafts = torch.multinomial(q.view(-1, vocab), 1, generator=random).view(batch, k) if k else torch.zeros(batch, 0, dtype=torch.int64)
    best = logits[:, :k].argmax(-1)
    drafts = torch.where(torch.rand(batch, k, generator=random) < 0.5, best, drafts)
    counts = torch.randint(0, k + 1, (batch,), generator=random)
    stale = torch.arange(k) >= counts[:, None]
    log_q = q.gather(-1, drafts[..., None])[..., 0].log().masked_fill(stale, float("nan"))
    q, drafts = q.masked_fill(stale[..., None], float("nan")), drafts.masked_fill(stale, 10**12)
    logits[torch.arange(2 * k + 1) > counts[:, None] + k] = float("nan")
    limits = torch.randint(0, k + 2, (batch,), generator=random)
    seq_lens = torch.randint(1, 5_000, (batch,), generator=random)
    logits, counts, seq_lens, drafts, log_q, limits, q = (part.to(device) for part in (logits, counts, seq_lens, drafts, log_q, limits, q))
    forks = counts // 2 if branch else None
    rows, sampling = rows_of(logits, counts, seq_lens, forks), parameters(params, device, seed)
    draws = truncate(rows, sampling, choose(rows, sampling, splits=1, block=128), block=128)
    return rows, sampling, draws, (drafts, counts, log_q, limits), q


@pytest.mark.parametrize("k, seed", [(0, 0), (1, 1), (3, 3)])
def test_a_step_is_what_loops_over_the_drafts_give(k, seed, device):
    """Any mixture of rules, counts and limits, at K = 3 a branch round; q is read at the slots that keep it; zeros in q; NaN behind what is valid."""
    salvage = k == 3
    params = MIXED[:4] if k == 0 else MIXED[:8]
    rows, sampling, draws, carried, q = step_of(params, k, 90, seed, device, branch=salvage)
    forks = carried[1] // 2 if salvage else None
    slots = torch.randperm(len(params), generator=torch.Generator().manual_seed(0)).to(device)
    kept = torch.full((len(params) + 1, 4, 90), float("nan"), device=device)
    kept[slots, :k] = q
    want = verify_reference(rows, sampling, draws, *carried, q, forks=forks, salvage=salvage)
    for splits in (1, 2) if k == 1 else (2,):
        got = verify(rows, sampling, draws, *carried, kept, slots, forks, salvage, splits=splits, block=64)
        for name in EXACT:
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        for name in ("introspection", "log_q"):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-6, equal_nan=True)
    print(f"K {k}: {int(got.deciding.sum())} of {int(carried[1].sum())} drafts stand")


def test_equal_p_and_q_always_stand(device):
    """p = q bit for bit: u < 1 accepts whatever the draw."""
    params = [Params(), Params(temperature=0.7), Params(top_k=7), Params(top_p=0.6)]
    batch, vocab, k = len(params), 40, 2
    logits = random_logits(batch, 1, vocab, 5, device).expand(-1, 2 * k + 1, -1).contiguous()
    counts, seq_lens = torch.zeros(batch, dtype=torch.int64, device=device), torch.arange(batch, device=device)
    q = torch.full((batch, k, vocab), float("nan"), device=device)
    cold = (torch.zeros(batch, k, dtype=torch.int64, device=device), counts, torch.zeros(batch, k, device=device), counts + k)
    sampling, slots = parameters(params, device), torch.arange(batch, device=device)
    first, _ = isd_step(rows_of(logits, counts, seq_lens), sampling, *cold, q, slots)
    assert (first.counts == k).all() and not q.isnan().any()
    torch.testing.assert_close(q.sum(-1), torch.ones(batch, k, device=device), rtol=1e-5, atol=0)
    rows = rows_of(logits, first.counts, seq_lens + 1)
    then, _ = isd_step(rows, sampling, first.drafts, first.counts, first.log_q, counts, q, slots)
    assert (then.accept_lens == k + 1).all() and not then.counts.any()
    torch.testing.assert_close(then.introspection, torch.full((batch,), 2.0, device=device), rtol=1e-5, atol=0)


def test_disjoint_p_and_q_never_stand_and_the_correction_is_from_p(device):
    logits = torch.full((2, 3, 6), NEG, device=device)
    logits[:, :, 4] = 0.0
    q = torch.zeros(2, 1, 6, device=device)
    q[:, :, 2] = 1.0
    one = torch.ones(2, dtype=torch.int64, device=device)
    rows, sampling = rows_of(logits, one, one), parameters([Params(), Params(top_k=3)], device)
    draws = truncate(rows, sampling, choose(rows, sampling, splits=1, block=128), block=128)
    got = verify(rows, sampling, draws, one[:, None] * 2, one, torch.zeros(2, 1, device=device), one, q, splits=1, block=128)
    assert got.accept_lens.tolist() == [1, 1] and got.last.tolist() == [4, 4] and got.introspection.tolist() == [0, 0]


def test_matching_alone_needs_no_q_and_a_missing_q_is_named(device):
    params = [GREEDY, Params(coupled=True)]
    rows, sampling, draws, carried, q = step_of(params, 2, 50, 7, device)
    assert torch.equal(verify(rows, sampling, draws, *carried).tokens, verify_reference(rows, sampling, draws, *carried).tokens)
    rows, sampling, draws, carried, q = step_of([Params()], 2, 50, 7, device)
    with pytest.raises(ValueError, match="q is missing; allowed: None only where no request uses the rejection rule"):
        verify(rows, sampling, draws, *carried)
