"""One step against a reference in plain loops, for any mixture of requests, and the statistics it reports."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_sglang.isd import first_proposal, isd_step, noise, verify
from tests.isd.reference import GREEDY, NEG, Params, sampling_rows, target_probs

KINDS = [
    GREEDY,
    Params(),
    Params(coupled=True),
    Params(temperature=0.6, top_p=0.7),
    Params(temperature=1.7, top_k=3, min_p=0.1, coupled=True),
    Params(temperature=0.6, top_p=0.7, top_k=2),
]


def loop_step(logits, drafts, count, q, limit, seq_len, params, seed, fork, salvage):
    """One request, draft by draft: tokens, next drafts, their rows, how many are clean, the sum of min(1, p/q), and log p of all rows."""
    k = len(drafts)
    p = target_probs(logits, params)
    log_p = np.log(np.where(p > 0, p, 1)) + np.where(p > 0, 0, NEG)
    key = torch.tensor([seed])

    def gumbel(row, stream):
        return noise.gumbel(key, torch.tensor([[seq_len + row]]), p.shape[1], stream)[0, 0].double().numpy()

    def draw(row, weights, stream):
        if params.top_k == 1:
            return int(np.argmax(weights))
        return int(
            np.argmax(np.where(weights > 0, np.log(np.where(weights > 0, weights, 1)) + gumbel(row, stream), NEG))
        )

    own_rule = params.top_k > 1 and not params.coupled
    tokens, introspection = [], 0.0
    for i, x in enumerate(drafts[:count]):
        if own_rule:
            introspection += min(1.0, p[i, x] / q[i, x])
            u = float(noise.uniform(key, torch.tensor([[seq_len + i]]))[0, 0])
            stands = u < p[i, x] / q[i, x]
        else:
            stands = draw(i, p[i], noise.STREAM_TOKEN) == x
            introspection += stands if params.top_k == 1 else min(1.0, p[i, x] / q[i, x])
        if not stands:
            weights = np.maximum(p[i] - q[i], 0) if own_rule else p[i]
            tokens.append(draw(i, weights, noise.STREAM_FINAL if own_rule else noise.STREAM_TOKEN))
            break
        tokens.append(int(x))
    else:
        tokens.append(draw(count, p[count], noise.STREAM_FINAL if own_rule else noise.STREAM_TOKEN))
    # Rows at consecutive positions, each seeing those before it; entry s stands s positions behind the pending token.
    spine = [*range(fork + 1), *range(count + 1, count + 1 + k)]
    accepted = len(tokens) - 1
    ahead = [(draw(s, p[row], noise.STREAM_TOKEN), row) for s, row in enumerate(spine) if s > accepted][: min(limit, k)]
    if accepted < fork and not salvage:
        ahead = []
    fresh, rows = [x for x, _ in ahead], [row for _, row in ahead]
    return tokens, fresh, rows, len(fresh) if accepted >= fork else 0, introspection, log_p


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(0, 4),
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    st.integers(2, 7),
    st.integers(0, 2**20),
    st.booleans(),
    st.sampled_from(["cold", "salvage"]),
)
def test_a_step_is_what_plain_loops_give(k, kinds, vocab, seed, near, policy):
    """Any batch size, width, count, fork, limit and mixture of rules; ``near`` makes q like p, so that drafts stand."""
    batch = len(kinds)
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, 2 * k + 1, vocab, generator=random) * 1.5
    logits = logits.masked_fill(torch.rand(logits.shape, generator=random) < 0.15, NEG)
    logits[..., 0] = logits[..., 0].clamp(min=-2)
    q_logits = (
        logits[:, :k] + torch.randn(batch, k, vocab, generator=random) * 0.3
        if near
        else torch.randn(batch, k, vocab, generator=random)
    )
    q = torch.softmax(q_logits.clamp(min=-6), dim=-1)
    drafts = (
        torch.multinomial(q.reshape(-1, vocab), 1, generator=random).view(batch, k)
        if k
        else torch.zeros(batch, 0, dtype=torch.int64)
    )
    log_q = q.gather(-1, drafts[..., None])[..., 0].log()
    counts = torch.randint(0, k + 1, (batch,), generator=random)
    limits = torch.randint(0, k + 2, (batch,), generator=random)
    seq_lens = torch.randint(1, 5_000, (batch,), generator=random)
    seeds = torch.randint(-(2**62), 2**62, (batch,), generator=random)
    # What stands behind the valid drafts is left over from earlier steps and may be anything.
    stale = torch.arange(k) >= counts[:, None]
    poisoned = q.masked_fill(stale[..., None], float("nan")), log_q.masked_fill(stale, float("nan"))
    salvage = policy == "salvage"
    forks = (counts * torch.rand(batch, generator=random) * 1.5).long().clamp(max=counts) if salvage else counts
    rows = sampling_rows(kinds, seeds)
    result = isd_step(logits, drafts, counts, poisoned[1], poisoned[0], limits, seq_lens, rows, forks if salvage else None, salvage)

    assert result.tokens.shape == (batch, k + 1) and result.proposal.drafts.shape == (batch, k)
    for b, params in enumerate(kinds):
        count = int(counts[b])
        tokens, fresh, drawn_by, fork, introspection, log_p = loop_step(
            logits[b].numpy(),
            drafts[b].tolist(),
            count,
            q[b].double().numpy(),
            int(limits[b]),
            int(seq_lens[b]),
            params,
            int(seeds[b]),
            int(forks[b]),
            salvage,
        )
        assert int(result.accept_lens[b]) == len(tokens) == int(result.deciding[b]) + 1
        assert result.tokens[b, : len(tokens)].tolist() == tokens and int(result.last[b]) == tokens[-1]
        assert int(result.proposal.counts[b]) == len(fresh) and int(result.proposal.clean[b]) == fork
        assert result.proposal.drafts[b, : len(fresh)].tolist() == fresh
        assert float(result.introspection[b]) == pytest.approx(introspection, abs=1e-4)
        for j, x in enumerate(fresh):
            row = log_p[drawn_by[j]]
            assert float(result.proposal.log_q[b, j]) == pytest.approx(0.0 if params.top_k == 1 else row[x], abs=1e-4)
            if result.proposal.q is not None and params.top_k > 1:
                np.testing.assert_allclose(result.proposal.q[b, j].numpy(), np.exp(row), atol=1e-5)


def test_shapes_and_types_are_as_documented():
    for k in range(4):
        rows = sampling_rows([Params(), GREEDY], torch.tensor([1, 2]))
        counts = torch.tensor([k, 0], dtype=torch.int32)
        q = torch.full((2, k, 5), 0.2)
        out = isd_step(
            torch.randn(2, 2 * k + 1, 5),
            torch.zeros(2, k, dtype=torch.int64),
            counts,
            torch.zeros(2, k),
            q,
            counts,
            counts,
            rows,
        )
        assert out.tokens.shape == (2, k + 1) and out.tokens.dtype == torch.int64
        assert (
            out.accept_lens.dtype == torch.int32
            and out.last.dtype == torch.int64
            and out.introspection.dtype == torch.float32
        )
        assert out.proposal.q.shape == (2, k, 5) and out.proposal.counts.dtype == torch.int64
        assert ((out.accept_lens >= 1) & (out.accept_lens <= counts + 1)).all()


def test_no_q_is_kept_or_needed_without_the_rejection_rule():
    for kinds in ([GREEDY, GREEDY], [GREEDY, Params(coupled=True)]):
        rows = sampling_rows(kinds, torch.tensor([1, 2]))
        drafts, counts = torch.zeros(2, 2, dtype=torch.int64), torch.tensor([2, 1])
        out = isd_step(torch.randn(2, 5, 6), drafts, counts, torch.zeros(2, 2), None, counts, counts, rows)
        assert out.proposal.q is None


def test_stride_one_needs_no_q():
    rows = sampling_rows([Params()], torch.tensor([1]))
    zero = torch.zeros(1, dtype=torch.int64)
    out = isd_step(
        torch.randn(1, 1, 6), torch.zeros(1, 0, dtype=torch.int64), zero, torch.zeros(1, 0), None, zero, zero, rows
    )
    assert int(out.accept_lens) == 1


@pytest.mark.parametrize("coupled", [False, True])
def test_introspection_is_the_mean_of_min_1_p_over_q(coupled):
    """Closed form: sum over tokens of min(p, q), per draft that is tried; drafts behind the first rejection do not count."""
    batch, k, vocab = 200_000, 3, 5
    random = torch.Generator().manual_seed(2)
    row_logits = torch.randn(2 * k + 1, vocab, generator=random)
    q_rows = torch.softmax(torch.randn(k, vocab, generator=random), dim=-1)
    seeds = torch.arange(batch)
    # Drafts with the noise of the rows that verify them, as the coupled rule needs.
    positions = torch.arange(k).expand(batch, -1) + 7
    drafts = (q_rows.log() + noise.gumbel(seeds, positions, vocab)).argmax(-1)
    log_q = q_rows.log()[torch.arange(k), drafts]
    counts = torch.arange(batch) % (k + 1)
    rows = sampling_rows([Params(coupled=coupled)] * batch, seeds)
    q = q_rows.expand(batch, -1, -1)
    out = isd_step(row_logits.expand(batch, -1, -1), drafts, counts, log_q, q, counts, torch.full((batch,), 7), rows)

    p_rows = torch.softmax(row_logits, dim=-1)[:k]
    overlap = torch.minimum(p_rows, q_rows).sum(-1)
    accepted = out.accept_lens.to(torch.int64) - 1
    tried = torch.minimum(accepted + 1, counts)
    wanted = (torch.arange(k) < tried[:, None]) * overlap
    error = (out.introspection - wanted.sum(1)).double()
    z = float(error.mean() / error.std() * batch**0.5)
    print(
        f"coupled {coupled}: {int(tried.sum())} drafts tried, mean {float(out.introspection.sum() / tried.sum()):.4f}, z = {z:.2f}"
    )
    assert abs(z) < 4
    if not coupled:
        stood = (accepted[counts > 0] > 0).double()
        assert abs(float(stood.mean()) - float(overlap[0])) < 4 * float(stood.std()) / len(stood) ** 0.5


def test_introspection_counts_tried_drafts_only():
    """Three drafts of p = q/2, p = 0, p = q: the second is rejected, the third never tried."""
    rows = sampling_rows([Params()] * 4, torch.tensor([1, 2, 3, 4]))
    p = torch.tensor([[0.25, 0.75], [0.0, 1.0], [0.5, 0.5]])
    logits = torch.cat([p, torch.full((4, 2), 0.5)]).log().expand(4, -1, -1)
    q = torch.full((4, 3, 2), 0.5)
    counts = torch.tensor([3, 2, 1, 0])
    out = isd_step(logits, torch.zeros(4, 3, dtype=torch.int64), counts, q.amax(-1).log(), q, counts, counts, rows)
    tried = torch.minimum(out.accept_lens.to(torch.int64), counts)
    assert (out.accept_lens <= 2).all()
    assert torch.allclose(out.introspection, torch.where(tried > 0, 0.5, 0.0))


def test_the_correction_of_a_rejection_that_leaves_nothing_is_drawn_from_p():
    """p = q bit for bit cannot be rejected; p below q everywhere by rounding can, with p as the limit."""
    log_p = torch.tensor([[0.25, 0.75, 0.0]] * 3).log()
    q = torch.tensor([[0.25, 0.75, 0.0], [0.2500001, 0.7500001, 0.0], [0.5, 0.5, 0.0]])
    left = verify.residual(log_p, q, torch.tensor([True, True, True]))
    assert torch.allclose(left[:2].exp(), log_p[:2].exp())
    assert left[2].exp().tolist() == [0.0, 0.25, 0.0]
    assert torch.allclose(verify.residual(log_p, q, torch.tensor([False] * 3)).exp(), log_p.exp())


def test_equal_p_and_q_are_accepted_whatever_the_draw():
    """The largest draw times q must still round below q."""
    probs = torch.cat(
        [torch.rand(200_000, generator=torch.Generator().manual_seed(0)), 2.0 ** -torch.arange(1, 100), torch.ones(1)]
    )
    probs = probs[probs > 0]
    largest = noise._unit(torch.tensor([2**32 - 1]))
    assert (largest * probs < probs).all()


def test_greedy_drafts_stand_exactly_when_they_are_the_argmax():
    logits = torch.tensor(
        [[[1.0, 3.0, 3.0], [0.0, 0.0, 0.0], [2.0, 1.0, 0.0], [0.0, 5.0, 5.0], [7.0, 7.0, 1.0]]]
    ).expand(4, -1, -1)
    drafts = torch.tensor([[1, 0], [2, 0], [1, 1], [1, 0]])
    counts = torch.tensor([2, 2, 2, 1])
    rows = sampling_rows([GREEDY] * 4, torch.arange(4))
    out = isd_step(logits, drafts, counts, torch.zeros(4, 2), None, torch.full((4,), 2), torch.full((4,), 3), rows)
    assert out.accept_lens.tolist() == [3, 1, 2, 2]
    assert [out.tokens[b, : out.accept_lens[b]].tolist() for b in range(4)] == [[1, 0, 0], [1], [1, 0], [1, 0]]
    assert out.proposal.counts.tolist() == [2, 0, 0, 2]
    assert out.proposal.drafts[0].tolist() == [1, 0] and out.proposal.drafts[3].tolist() == [0, 1]
    assert out.introspection.tolist() == [2.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("q_filler", [0.0, 1.0, float("inf"), float("nan")])
def test_padding_and_stale_values_reach_nothing(q_filler):
    """Rows behind c + K, drafts behind the count and their q may hold anything."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 4, generator=random)
    counts = torch.tensor([1, 1, 0, 0, 1, 0])
    rows = sampling_rows(KINDS, torch.arange(6))
    drafts, log_q, q = torch.tensor([[2, 1]] * 6), torch.full((6, 2), -1.0), torch.full((6, 2, 4), 0.25)
    call = lambda *inputs: isd_step(*inputs, torch.full((6,), 2), torch.full((6,), 3), rows)
    clean = call(logits, drafts, counts, log_q, q)
    stale = torch.arange(2) >= counts[:, None]
    padding = torch.arange(5) > counts[:, None] + 2
    soiled = call(
        logits.masked_fill(padding[..., None], float("-inf")),
        drafts.masked_fill(stale, 3),
        counts,
        log_q.masked_fill(stale, q_filler),
        q.masked_fill(stale[..., None], q_filler),
    )
    for name in ("accept_lens", "last", "introspection", "deciding"):
        assert torch.equal(getattr(clean, name), getattr(soiled, name)), name
    committed = torch.arange(3) < clean.accept_lens[:, None]
    assert torch.equal(clean.tokens[committed], soiled.tokens[committed])
    for name in ("drafts", "counts", "log_q", "q"):
        assert torch.equal(getattr(clean.proposal, name), getattr(soiled.proposal, name)), name


def test_masks_behind_a_prompt_propose_what_a_cold_step_would():
    """The same MASK rows at the same positions: the drafts, their q and counts do not depend on which forward held the rows."""
    batch, k, vocab = len(KINDS), 3, 11
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(batch, 2 * k + 1, vocab, generator=generator)
    rows = sampling_rows(KINDS, seeds=torch.arange(batch))
    limits, pending_at = torch.tensor([3, 2, 0, 1, 3, 3]), torch.arange(5, 5 + batch)
    none = torch.zeros(batch, k, dtype=torch.int64)
    cold = isd_step(
        logits, none, torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, k), torch.zeros(batch, k, vocab), limits, pending_at, rows
    ).proposal
    warm = first_proposal(logits[:, 1 : k + 1], limits, pending_at + 1, rows)
    for name in ("drafts", "counts", "log_q", "q"):
        torch.testing.assert_close(getattr(warm, name), getattr(cold, name), rtol=0, atol=0)
    index = torch.tensor([4, 1])
    part = first_proposal(logits[index, 1 : k + 1], limits[index], pending_at[index] + 1, rows.at(index))
    assert torch.equal(part.drafts, warm.drafts[index]) and torch.equal(part.q, warm.q[index])
