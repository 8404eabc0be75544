"""Top-k, top-p and min-p without a sort: exactly the support of the joint rule, ties included, and draws from it."""

import pytest
import torch

from idlm_kernels.choose import choose
from idlm_kernels.noise import gumbel_reference
from idlm_kernels.store_q import store_q
from idlm_kernels.truncate import support_reference, truncate, truncate_reference
from idlm_sglang.isd import target_scores
from idlm_sglang.isd.target import support
from tests.isd.reference import GREEDY, NEG, Params
from tests.kernels.common import TRUNCATED, assert_same_draw, parameters, random_logits, rows_of

EDGES = [
    Params(top_k=2),
    Params(top_p=1e-9),
    Params(top_p=0.0),
    Params(top_p=0.999999),
    Params(min_p=1.0),
    Params(min_p=1.5),
    Params(temperature=20.0, top_p=0.9, top_k=300),
    Params(temperature=0.05, min_p=0.3),
]


def drawn(logits, params, device, block=256, **options):
    batch = len(params)
    counts = torch.full((batch,), (logits.shape[1] - 1) // 2, device=device)
    rows, sampling = rows_of(logits, counts, torch.arange(batch, device=device) * 10), parameters(params, device)
    draws = choose(rows, sampling, splits=1, block=block)
    return rows, sampling, draws, truncate(rows, sampling, draws, block=block, **options)


def probabilities(rows, sampling, draws):
    """``(B, R, V)`` p before truncation, bit for bit as the kernels compute it."""
    batch, _, columns, vocab = rows.shape
    out = torch.full((batch, columns, vocab), float("nan"), device=rows.logits.device)
    every = type(sampling)(**(vars(sampling) | dict(coupled=torch.zeros_like(sampling.coupled), any_rejection=True)))
    source = torch.arange(columns, dtype=torch.int32, device=rows.logits.device).repeat(batch, 1)
    store_q(rows, every, draws, source, out, torch.arange(batch, device=rows.logits.device), block=256)
    return out


def kept(p, draws):
    tokens = torch.arange(p.shape[-1], device=p.device)
    return (p > draws.edge[..., None]) | ((p == draws.edge[..., None]) & (tokens <= draws.tie[..., None]))


@pytest.mark.parametrize("step", [0.0, 1.0])
def test_the_support_is_exactly_that_of_the_joint_rule(step, device):
    """On random rows, and on rows with some forty tokens to a value, where only the tie rule tells them apart."""
    params = TRUNCATED + EDGES
    logits = random_logits(len(params), 1, 600, 1, device, step)
    rows, sampling, before, draws = drawn(logits, params, device)
    p = probabilities(rows, sampling, before)
    want = support(p, sampling.top_k, sampling.top_p, sampling.min_p)
    assert torch.equal(want, support_reference(p, sampling.top_k, sampling.top_p, sampling.min_p))
    got = kept(p, draws)
    assert torch.equal(got, want), (got != want).sum(-1)
    print(f"step {step}: tokens kept per row {want.sum(-1)[:, 0].tolist()}")


def test_of_equal_tokens_the_lowest_ids_stay(device):
    """A row of forty equal tokens: all but one, all but two, two; and the nucleus of half of them."""
    params = [Params(top_k=39), Params(top_k=38), Params(top_k=2), Params(top_p=0.5)]
    logits = torch.zeros(4, 1, 40, device=device)
    rows, sampling, before, draws = drawn(logits, params, device)
    p = probabilities(rows, sampling, before)
    got = kept(p, draws)
    assert torch.equal(got, support(p, sampling.top_k, sampling.top_p, sampling.min_p))
    assert got.sum(-1)[:3, 0].tolist() == [39, 38, 2] and not (got[..., 1:] & ~got[..., :-1]).any()


def test_tokens_log_p_and_mass_are_those_of_the_reference(device):
    params = [*TRUNCATED, *EDGES, GREEDY, Params()]
    rows, sampling, before, draws = drawn(random_logits(len(params), 1, 600, 2, device), params, device)
    keep, want = truncate_reference(rows, sampling, before)
    x = rows.read() / torch.where(sampling.top_k <= 1, 1.0, sampling.temperature)[:, None, None]
    noisy = (x + gumbel_reference(sampling.seed, rows.positions, 600)[0]).masked_fill(~keep, NEG)
    mine = [i for i, one in enumerate(params) if one.top_k > 1 and one.truncated]
    assert_same_draw(draws.tokens[mine], want.tokens[mine], noisy[mine])
    assert torch.equal(draws.tokens[-2:], want.tokens[-2:]) and (draws.edge[-2:] == -1).all()
    for name in ("log_p", "log_kept"):
        torch.testing.assert_close(getattr(draws, name), getattr(want, name), rtol=2e-6, atol=2e-6)
    scores = target_scores(rows.logits, sampling)
    assert torch.equal(keep[mine], scores[mine] > NEG)


def test_nothing_depends_on_capacity_splits_or_blocks(device):
    """Capacity 4 sends every row through the search over the whole row."""
    params = TRUNCATED[1:4]
    logits = random_logits(len(params), 1, 600, 3, device, 0.5)
    _, _, _, want = drawn(logits, params, device)
    for options in (dict(capacity=4), dict(splits=1, select_block=64)):
        _, _, _, got = drawn(logits, params, device, **options)
        for name in ("tokens", "log_p", "edge", "tie", "log_kept"):
            assert torch.equal(getattr(got, name), getattr(want, name)), (options, name)


def test_a_row_of_one_token_and_a_row_of_none(device):
    logits = torch.full((2, 1, 300), NEG, device=device)
    logits[0, 0, 299] = -7.0
    for params in (Params(top_k=5), Params(top_p=0.5), Params(min_p=0.2)):
        _, _, _, draws = drawn(logits, [params] * 2, device)
        assert draws.tokens[:, 0].tolist() == [299, 0] and draws.log_p[0, 0] == 0


def test_top_k_one_is_greedy(device):
    logits = random_logits(2, 1, 300, 4, device, 1.0)
    _, _, _, draws = drawn(logits, [GREEDY, Params(top_k=2)], device)
    assert int(draws.tokens[0, 0]) == int(logits[0, 0].argmax()) and draws.log_p[0, 0] == 0


def test_the_published_sampling_at_the_vocabulary_of_qwen3(device):
    logits = random_logits(1, 1, 151_936, 5, device)
    logits[0, 0, torch.arange(0, 140_000, 1_000, device=device)] += 12
    rows, sampling, before, draws = drawn(logits, [Params(top_k=50, top_p=0.95)], device, block=2048)
    keep, want = truncate_reference(rows, sampling, before)
    assert torch.equal(draws.tokens, want.tokens) and bool(keep[0, 0, int(draws.tokens)])
    print(f"{int(keep.sum())} of {keep.numel()} tokens kept")
