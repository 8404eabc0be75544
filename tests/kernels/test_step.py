"""The whole step: same seeds, same tokens as `isd.isd_step`; and drawn tokens that follow the laws they should."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_kernels import choose as choosing
from idlm_kernels import verify as verifying
from idlm_kernels.noise import unit
from idlm_kernels.step import isd_step
from idlm_sglang import isd
from tests.isd.reference import NEG, Params, counts_p, target_probs
from tests.kernels.common import MIXED, parameters, random_logits, rows_of
from tests.kernels.conftest import INTERPRETED
from tests.kernels.test_verify import step_of

tl = choosing.tl


@settings(max_examples=4 if INTERPRETED else 200, deadline=None, derandomize=True)
@given(st.integers(0, 3), st.booleans(), st.lists(st.sampled_from(MIXED), min_size=1, max_size=5), st.integers(3, 140), st.integers(0, 2**20))
def test_same_seeds_same_tokens_as_plain_torch(k, salvage, params, vocab, seed):
    """Random mixtures of rules, counts, limits and vocabularies, linear and branch rounds: committed tokens, next drafts, counts, log q, q, introspection."""
    device = "cpu" if INTERPRETED else "cuda"
    rows, sampling, _, (drafts, counts, log_q, limits), q = step_of(params, k, vocab, seed, device, branch=salvage)
    forks = counts // 2 if salvage else counts
    drafts = drafts.where(torch.arange(k, device=device) < counts[:, None], 0)
    seq_lens = rows.positions[:, 0]
    want = isd.isd_step(rows.logits, drafts, counts, log_q, q, limits, seq_lens, sampling, forks, salvage)
    kept = q.clone()
    got, _ = isd_step(rows, sampling, drafts, counts, log_q, limits, kept, torch.arange(len(params), device=device), forks, salvage)
    committed = torch.arange(k + 1, device=device) < want.accept_lens[:, None]
    assert torch.equal(got.accept_lens, want.accept_lens) and torch.equal(got.deciding, want.deciding)
    assert torch.equal(got.tokens[committed], want.tokens[committed]) and torch.equal(got.last, want.last)
    assert torch.equal(got.counts, want.proposal.counts) and torch.equal(got.clean, want.proposal.clean)
    valid = torch.arange(k, device=device) < got.counts[:, None]
    assert torch.equal(got.drafts[valid], want.proposal.drafts[valid])
    close = dict(rtol=1e-5, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(got.introspection, want.introspection, **close)
    torch.testing.assert_close(got.log_q[valid], want.proposal.log_q[valid], **close)
    rejecting = ((sampling.top_k > 1) & ~sampling.coupled)[:, None] & valid
    if sampling.any_rejection:
        torch.testing.assert_close(kept[rejecting], want.proposal.q[rejecting], **close)


LAW = torch.tensor([[2.0, 0.5, NEG, 1.0], [0.0, 1.5, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
Q = torch.tensor([0.1, 0.2, 0.0, 0.7])


def first_tokens(rule: Params, device: str, batch: int) -> np.ndarray:
    """How often each token comes out first, over ``batch`` seeds: one draft, drawn from Q, by the rule."""
    seeds_differ = parameters([rule] * batch, device)
    random = torch.Generator().manual_seed(3)
    drafts = torch.multinomial(Q.expand(batch, -1), 1, generator=random).to(device)
    one = torch.ones(batch, dtype=torch.int64, device=device)
    rows = rows_of(LAW.to(device).expand(batch, -1, -1), one, one * 17)
    q = Q.to(device).expand(batch, 1, -1).contiguous()
    log_q = Q.to(device).log()[drafts]
    got, _ = isd_step(rows, seeds_differ, drafts, one, log_q, one, q, torch.arange(batch, device=device))
    return np.bincount(got.tokens[:, 0].cpu(), minlength=4).astype(float)


RULES = {"coupled": Params(temperature=0.8, coupled=True), "rejection": Params(temperature=0.8)}
# An interpreted request takes a fifteenth of a second. That the tokens are those of plain torch, whose laws are tested on 200,000, is shown above.
BATCH = 50 if INTERPRETED else 20_000


def p_value(rule: Params, device: str, batch: int = BATCH) -> float:
    law = target_probs(LAW[:1].numpy(), rule)[0]
    return counts_p(first_tokens(rule, device, batch), law * batch)


@pytest.mark.parametrize("name", RULES)
def test_the_first_token_follows_p(name, device):
    p = p_value(RULES[name], device)
    print(f"{name}: {BATCH} seeds, p = {p:.3f}")
    assert p > 1e-3


@choosing.triton.jit
def flatter(bits):
    return tl.log(unit(bits)) * 0.2


@choosing.triton.jit
def lenient(seed, position, stream: tl.constexpr):
    return (seed * 0 + position * 0).to(tl.float32)


@pytest.mark.skipif(not INTERPRETED, reason="plants a function in a kernel, which compiled code would not notice")
@pytest.mark.parametrize("name, module, function, planted", [("coupled", choosing, "gumbel_of", flatter), ("rejection", verifying, "uniform_of", lenient)])
def test_a_wrong_noise_or_acceptance_fails_the_distribution_test(name, module, function, planted, device, monkeypatch):
    monkeypatch.setattr(module, function, planted)
    p = p_value(RULES[name], device, 30)
    print(f"{name} with {function} replaced: p = {p:.1e}")
    assert p < 1e-3


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_a_step_does_not_wait_for_the_device():
    rows, sampling, _, carried, q = step_of(MIXED, 3, 140, 1, "cuda")
    slots = torch.arange(len(MIXED), device="cuda")
    isd_step(rows, sampling, *carried, q, slots)
    torch.cuda.set_sync_debug_mode("error")
    try:
        isd_step(rows, sampling, *carried, q, slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")
