"""Logits to the request's own distribution: against numpy, against SGLang's torch sampler, and row by row alone."""

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from idlm_sglang.isd import target
from idlm_sglang.isd.target import support, target_scores
from tests.isd.reference import GREEDY, NEG, OFF, Params, sampling_rows, target_probs

PARAMS = [
    Params(),
    Params(temperature=0.7, top_p=0.8),
    Params(temperature=1.5, top_k=20, min_p=0.1),
    Params(top_k=2),
    Params(top_k=50, top_p=0.95),
    Params(temperature=0.05),
    Params(temperature=20.0, top_p=0.3),
    Params(min_p=0.3),
    Params(temperature=1.3, top_k=7, top_p=0.6, min_p=0.05),
    GREEDY,
]


def random_logits(batch: int, rows: int, vocab: int, seed: int) -> torch.Tensor:
    logits = torch.randn(batch, rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2.5
    logits[..., vocab // 2] = NEG
    return logits


def scores_of(logits: torch.Tensor, params: list[Params]) -> torch.Tensor:
    return target_scores(logits, sampling_rows(params, torch.arange(len(params))))


def sglang_sampler():
    """SGLang's torch sampler, compiled from its installed source: its module takes ten seconds to import."""
    spec = importlib.util.find_spec("sglang")
    name = "top_k_top_p_min_p_sampling_from_probs_torch"
    path = Path(spec.submodule_search_locations[0]) / "srt" / "layers" / "sampler.py"
    body = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == name]
    scope: dict = {}
    exec("from __future__ import annotations\nimport torch", scope)
    flags = compile("from __future__ import annotations", "", "exec").co_flags & 0x1000000
    exec(compile(ast.Module(body, []), str(path), "exec", flags=flags), scope)
    return scope[name]


@pytest.mark.parametrize("vocab", [3, 50, 1_003])
def test_scores_are_log_p_of_the_joint_rule(vocab):
    logits = random_logits(len(PARAMS), 4, vocab, vocab)
    scores = scores_of(logits, PARAMS)
    for line, params in enumerate(PARAMS):
        if params.top_k == 1:
            continue
        wanted = target_probs(logits[line].numpy(), params)
        got = scores[line].double().exp().numpy()
        assert np.array_equal(got > 0, wanted > 0), params
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-30)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 10_000),
    st.floats(0.1, 5.0),
    st.one_of(st.just(OFF), st.integers(2, 12)),
    st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
)
def test_scores_match_the_reference_for_any_parameters(seed, temperature, top_k, top_p, min_p):
    params = Params(float(np.float32(temperature)), top_k, float(np.float32(top_p)), float(np.float32(min_p)))
    logits = random_logits(1, 3, 11, seed)
    wanted = target_probs(logits[0].numpy(), params)
    got = scores_of(logits, [params])[0].double().exp().numpy()
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-38)


@pytest.mark.parametrize("need_min_p", [False, True])
def test_support_is_that_of_sglangs_torch_sampler(need_min_p):
    """Random rows without ties, top-k, top-p and min-p together."""
    batch, vocab = 600, 200
    random = torch.Generator().manual_seed(3)
    probs = torch.softmax(torch.randn(batch, vocab, generator=random) * 2, dim=-1)
    top_k = torch.where(
        torch.rand(batch, generator=random) < 0.3, OFF, torch.randint(1, 60, (batch,), generator=random)
    ).int()
    top_p = torch.where(
        torch.rand(batch, generator=random) < 0.3, 1.0, torch.rand(batch, generator=random).clamp(min=0.01)
    )
    min_p = torch.rand(batch, generator=random) * 0.3 * need_min_p
    kept = sglang_sampler()(
        probs.clone(), top_k, top_p, min_p, need_min_p, None, torch.zeros(batch), return_filtered_probs=True
    )
    theirs = torch.zeros(batch, vocab, dtype=torch.bool).scatter_(1, kept[2].long(), kept[1] > 0)
    ours = support(probs[:, None], top_k, top_p, min_p)[:, 0]
    # Top-p 1 keeps everything here; SGLang loses the tail where the rounded sum passes 1.
    lost = probs[ours & ~theirs]
    assert torch.equal(ours[top_p < 1], theirs[top_p < 1]) and not (theirs & ~ours).any()
    print(f"{batch} rows, {int(ours.sum())} tokens kept; only here: {lost.numel()} of mass {float(lost.sum()):.1e}")
    assert float(lost.sum()) < 1e-4


def test_ties_go_to_the_lower_id():
    probs = torch.tensor([[[0.1, 0.2, 0.2, 0.2, 0.2, 0.1]]])
    off = {"top_k": torch.tensor([OFF]), "top_p": torch.tensor([1.0]), "min_p": torch.tensor([0.0])}
    cut = lambda **changed: (
        support(probs, **(off | {name: torch.tensor([value]) for name, value in changed.items()}))[0, 0]
        .nonzero()[:, 0]
        .tolist()
    )
    assert cut() == [0, 1, 2, 3, 4, 5]
    assert cut(top_k=1) == [1]
    assert cut(top_k=3) == [1, 2, 3]
    assert cut(top_k=5) == [0, 1, 2, 3, 4]
    assert cut(top_p=0.3) == [1, 2]
    assert cut(top_p=0.85) == [0, 1, 2, 3, 4]
    assert cut(top_p=1e-9) == [1]
    assert cut(top_p=0.0) == [1]
    assert cut(min_p=1.0) == [1, 2, 3, 4]
    assert cut(min_p=1.5) == [1]
    assert cut(min_p=0.6, top_k=2) == [1, 2]
    uniform = torch.full((1, 1, 1_000), 1e-3)
    assert support(uniform, torch.tensor([400]), torch.tensor([1.0]), torch.tensor([0.0]))[0, 0].nonzero()[
        :, 0
    ].tolist() == list(range(400))


def test_the_edges_of_top_p_and_min_p_are_inside():
    """A token stays when the mass before it is exactly top-p, or when it is exactly min-p times the most probable."""
    probs = torch.tensor([[[0.125, 0.5, 0.25, 0.125]]])
    kept = lambda top_p, min_p: (
        support(probs, torch.tensor([OFF]), torch.tensor([top_p]), torch.tensor([min_p])).sum().item()
    )
    assert [kept(top_p, 0.0) for top_p in (0.499, 0.5, 0.749, 0.75, 0.874, 0.875)] == [1, 2, 2, 3, 3, 4]
    assert [kept(1.0, min_p) for min_p in (0.501, 0.5, 0.251, 0.25)] == [1, 2, 2, 4]


def test_extreme_parameters_leave_one_token_or_all():
    logits = random_logits(1, 3, 40, 8)
    top = logits.argmax(-1)
    for params in (
        Params(top_p=1e-9),
        Params(min_p=1.0),
        Params(temperature=1e-4),
        Params(temperature=1e-4, top_p=0.5),
    ):
        scores = scores_of(logits, [params])
        assert torch.equal(scores.argmax(-1), top) and not scores.isnan().any()
        assert torch.allclose(scores.exp().sum(-1), torch.ones(1, 3))
        assert ((scores.exp() > 1e-6).sum(-1) == 1).all()
    flat = scores_of(logits, [Params(temperature=1e6)])
    assert torch.equal(flat.isinf(), logits.isinf())
    assert torch.allclose(flat.exp().amax(-1), torch.full((1, 3), 1 / 39), rtol=1e-3)


def test_excluded_tokens_stay_excluded_and_nothing_is_nan():
    logits = random_logits(len(PARAMS), 2, 9, 1)
    logits[:, 1] = NEG
    logits[:, 1, 3] = -4.0
    scores = scores_of(logits, PARAMS)
    assert not scores.isnan().any()
    assert (scores[logits == NEG] == NEG).all()
    sampled = torch.tensor([params.top_k > 1 for params in PARAMS])
    assert (scores[sampled, 1, 3] == 0).all()


def test_a_row_of_minus_infinity_harms_no_other_row():
    """A row that nothing reads (padding) may hold anything."""
    logits = random_logits(len(PARAMS), 3, 9, 2)
    clean = scores_of(logits, PARAMS)
    for filler in (NEG, float("nan"), float("inf")):
        logits[:, 1] = filler
        assert torch.equal(scores_of(logits, PARAMS)[:, [0, 2]], clean[:, [0, 2]])


@pytest.mark.parametrize("vocab", [17, 1_003])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(vocab):
    """Truncated, untruncated and greedy requests together: nobody's scores move, not even by a last bit."""
    params = PARAMS * 3
    logits = random_logits(len(params), 5, vocab, 5) * 1.5
    together = scores_of(logits, params)
    order = torch.randperm(len(params), generator=torch.Generator().manual_seed(0))
    assert torch.equal(scores_of(logits[order], [params[i] for i in order.tolist()]), together[order])
    for line, one in enumerate(params):
        assert torch.equal(scores_of(logits[line : line + 1], [one])[0], together[line]), one
        for row in range(5):
            assert torch.equal(
                scores_of(logits[line : line + 1, row : row + 1].clone(), [one])[0, 0], together[line, row]
            )


def test_top_p_one_keeps_the_tail_beside_a_truncated_mate():
    """Probabilities of a large vocabulary add up to more than 1 in float32; the tokens behind that point are still possible."""
    logits = torch.randn(8, 1, 50_000, generator=torch.Generator().manual_seed(0)) * 4
    mate = [Params(top_k=5)]
    beside = scores_of(torch.cat([logits, logits[:1]]), [Params(min_p=1e-30)] * 8 + mate)[:8]
    cumulated = torch.sort(torch.softmax(logits, -1), descending=True).values.double().cumsum(-1)
    print(f"rows that add up to more than 1: {int((cumulated[..., -1] > 1).sum())} of 8")
    assert (cumulated[..., -1] > 1).any()
    assert not beside.isinf().any()


def test_greedy_rows_are_the_logits_themselves():
    logits = random_logits(4, 3, 33, 6)
    near = torch.nextafter(torch.tensor(1e4), torch.tensor(2e4))
    logits[0, 0, 5], logits[0, 0, 20] = 1e4, float(near)
    params = [GREEDY, Params(0.5, top_p=0.4), GREEDY, Params(top_k=2)]
    mixed = scores_of(logits, params)
    assert torch.equal(mixed[[0, 2]], logits[[0, 2]])
    assert int(mixed[0, 0].argmax()) == 20
    assert torch.equal(scores_of(logits, [GREEDY] * 4), logits)


def test_flags_may_say_more_than_the_batch_needs():
    """An engine that sets any_truncated or any_sampled once and for all gets the same rows."""
    params = [Params(), GREEDY, Params(temperature=0.6, coupled=True)]
    logits = random_logits(3, 2, 1_003, 9) * 2
    rows = sampling_rows(params, torch.arange(3))
    assert not rows.any_truncated
    assert torch.equal(target_scores(logits, replace(rows, any_truncated=True)), target_scores(logits, rows))


@pytest.mark.parametrize("step", [0.0, 0.5])
@pytest.mark.parametrize("vocab", [100, 1_003])
def test_the_ways_around_a_sort_keep_exactly_what_the_sort_keeps(vocab, step):
    """Small top-k and min-p alone, random rows and rows full of ties: equal supports and equal bits of the scores."""
    logits = random_logits(len(PARAMS), 4, vocab, vocab)
    logits = (logits / step).round() * step if step else logits
    small = [replace(one, top_k=min(one.top_k, 50)) for one in PARAMS if one.top_k > 1]
    min_p = [Params(min_p=value) for value in (0.001, 0.3, 1.0, 1.5)] + [GREEDY, Params()]
    for params, changed in ((small, {"largest_top_k": None}), (min_p, {"min_p_only": False})):
        rows = sampling_rows(params, torch.arange(len(params)))
        assert rows.min_p_only if params is min_p else rows.largest_top_k == 50
        line = logits[: len(params)]
        whole = target_scores(line, replace(rows, **changed))
        assert torch.equal(target_scores(line, rows), whole)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target.noise, "BLOCK", 3 * vocab)
            assert torch.equal(target_scores(line, rows), whole)
    mixed = sampling_rows([*small, Params(top_p=0.9)], torch.arange(len(small) + 1))
    assert mixed.largest_top_k is None and not mixed.min_p_only


def test_a_nucleus_of_a_large_vocabulary_is_that_of_the_whole_sort(monkeypatch):
    """Batches whose kept tokens are among the first ones looked at, and batches of which one row's are not."""
    vocab, ordered, looked = target._LARGE + 3, target._ordered, []
    monkeypatch.setattr(target, "_ordered", lambda probs, most: looked.append(most) or ordered(probs, most))
    narrow = [Params(top_p=0.01), Params(temperature=0.2, top_p=0.8), Params(top_p=0.5, min_p=0.9), Params(), GREEDY]
    for other, enough in ((None, True), (Params(top_p=0.9999), False), (Params(top_p=0.98, min_p=1e-6), False), (Params(top_k=target._NUCLEUS + 1), False)):
        params = narrow if other is None else [*narrow, other]
        rows = replace(sampling_rows(params, torch.arange(len(params))), largest_top_k=None)
        logits = random_logits(len(params), 3, vocab, 7)
        got, at = target_scores(logits, rows), looked.copy()
        assert at == [target._NUCLEUS, vocab][: 1 if enough else 2]
        with monkeypatch.context() as patch:
            patch.setattr(target, "_NUCLEUS", vocab)
            assert torch.equal(got, target_scores(logits, rows))
        looked.clear()


def test_the_ways_around_a_sort_never_ask_for_a_value():
    rows = sampling_rows([Params(top_k=5), Params(min_p=0.1)], torch.arange(2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for changed in ({"largest_top_k": 5}, {"min_p_only": True}):
            assert target_scores(torch.empty(2, 3, 100), replace(rows, **changed)).shape == (2, 3, 100)
