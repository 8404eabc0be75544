"""Several consecutive steps emit exactly what plain AR emits: joint distributions over tabular models, where the
target is any function of the prefix and the drafts' q any unrelated one. The last part shows that the same test
rejects procedures that are nearly right."""

from dataclasses import replace
from itertools import cycle

import pytest
import torch

from idlm_sglang.isd import BRANCH, CHAIN, OFF, noise, propose, step, verify
from tests.isd.reference import GREEDY, Params, Tabular, emit, sampling_rows, worst_p

ROWS = 100_000
FEW = 50_000  # enough to notice a bias
# Smallest of up to 19 p-values per case (joint, singles, pairs, triples), seeds fixed: exact rules stay above, biased below.
EXACT, BIASED = 2e-4, 1e-9

MODELS = {
    "unrelated q": dict(),
    "q with zeros": dict(q_zeros=0.4),
    "p with zeros": dict(p_zeros=0.4, q_zeros=0.2),
    "one-hot q": dict(q_one_hot=True),
    "q equal to p": dict(context=0.0),
    "far apart": dict(spread=3.0),
}
REJECTION, COUPLED = Params(), Params(coupled=True)
TRUNCATED = {
    "top-p": dict(temperature=0.7, top_p=0.8),
    "top-k and min-p": dict(temperature=1.5, top_k=3, min_p=0.2),
    "top-k and top-p": dict(top_k=2, top_p=0.9),
    "high temperature": dict(temperature=3.0),
}


def report(name: str, emitted, vocab: int, law) -> float:
    p, place = worst_p(emitted.tokens, vocab, law)
    length = emitted.tokens.shape[1]
    rate = (length - 1) / float(emitted.forwards.double().mean())
    print(
        f"{name}: {len(emitted.tokens)} samples of {length} tokens, {rate:.2f} tokens per forward, smallest p = {p:.2g} ({place})"
    )
    return p


def check(
    name: str, model: Tabular, params: Params, length: int, strides, seed: int = 0, rows: int = ROWS, **hooks
) -> float:
    seeds = torch.arange(rows) + seed * 10_000_019 - rows // 2
    emitted = emit(model, sampling_rows([params] * rows, seeds), length, strides, **hooks)
    return report(name, emitted, model.vocab, model.law(params, length))


@pytest.mark.parametrize(
    "name, stride", [(name, 3) for name in MODELS] + [("unrelated q", 2), ("q with zeros", 2), ("q with zeros", 4)]
)
def test_rejection_emits_the_ar_distribution(name, stride):
    vocab, length = (4, 4) if stride == 2 else (3, 5)
    assert (
        check(f"rejection, {name}, N = {stride}", Tabular(vocab, **MODELS[name]), REJECTION, length, stride, stride)
        > EXACT
    )


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_long_accepted_runs_emit_the_ar_distribution(stride):
    """A q near p: most drafts stand, and the joint law spans several steps that carry drafts over."""
    model = Tabular(3, order=7, seed=5, context=0.3)
    assert check(f"rejection, q near p, N = {stride}", model, REJECTION, 7, stride, stride) > EXACT


@pytest.mark.parametrize("name", ["unrelated q", "p with zeros", "one-hot q"])
def test_coupled_emits_the_ar_distribution(name):
    """What is emitted is the same at any stride (test_coupled), so one stride shows it."""
    assert check(f"coupled, {name}, N = 3", Tabular(3, **MODELS[name]), COUPLED, 5, 3, seed=9) > EXACT


@pytest.mark.parametrize("coupled", [False, True])
def test_stride_one_emits_the_ar_distribution(coupled):
    assert check(f"N = 1, coupled {coupled}", Tabular(3), Params(coupled=coupled), 4, 1, seed=5) > EXACT


@pytest.mark.parametrize("name", TRUNCATED)
def test_sampling_parameters_shape_both_p_and_q(name):
    params = Params(**TRUNCATED[name])
    assert check(f"rejection, {name}", Tabular(4, order=4, seed=2), params, 4, 3, seed=4) > EXACT


def test_changing_strides_and_limits_keep_the_distribution():
    """Narrowed, dropped and widened between steps, by draws that know nothing of the drafts."""
    random = torch.Generator().manual_seed(0)
    limits = lambda batch, k: torch.randint(0, k + 1, (batch,), generator=random)
    strides = lambda: cycle([3, 4, 2, 4, 1, 3])
    assert check("random limits", Tabular(3, seed=3), REJECTION, 5, 4, seed=6, limits=limits) > EXACT
    assert (
        check("random limits and strides", Tabular(3, seed=3), REJECTION, 5, strides(), seed=7, limits=limits) > EXACT
    )
    assert (
        check("random limits and strides, coupled", Tabular(3, seed=3), COUPLED, 5, strides(), seed=8, limits=limits)
        > EXACT
    )


def test_dropping_drafts_by_their_q_alone_keeps_the_distribution():
    """A confidence limit may look at q as a whole: here drafts are kept while max q > 0.6."""
    sure = lambda result: result.proposal.counts * verify.leading(result.proposal.q.amax(-1) > 0.6).clamp(max=1)
    assert check("dropped by max q", Tabular(3, seed=3), REJECTION, 5, 3, seed=10, survivors=sure) > EXACT


@pytest.mark.parametrize("salvage", [OFF, BRANCH, CHAIN])
def test_mask_rows_left_out_by_what_was_accepted_before_keep_the_distribution(salvage):
    """As a request's record has it: few behind rounds whose drafts fell."""
    model = Tabular(3, order=7, seed=5, context=0.3)
    by_record = lambda drafts, counts, run: torch.minimum(run, torch.tensor(drafts.shape[1] - 1)) + 1
    assert check(f"MASK rows by the round before, {salvage}", model, REJECTION, 6, 4, seed=13, salvage=salvage, masks=by_record) > EXACT


def test_greedy_rejection_and_coupled_rows_in_one_batch():
    model, length = Tabular(3, seed=4), 4
    kinds = [
        GREEDY,
        REJECTION,
        Params(coupled=True, temperature=0.7, top_p=0.8),
        Params(temperature=1.5, top_k=2),
        COUPLED,
    ]
    rows = len(kinds) * ROWS // 2
    random = torch.Generator().manual_seed(1)
    limits = lambda batch, k: torch.randint(0, k + 1, (batch,), generator=random)
    emitted = emit(model, sampling_rows(kinds * (rows // len(kinds)), torch.arange(rows)), length, 3, limits)
    for number, params in enumerate(kinds):
        law, part = model.law(params, length), emitted.tokens[number :: len(kinds)]
        p, place = worst_p(part, model.vocab, law)
        print(f"{params}: {len(part)} samples, smallest p = {p:.2g} ({place})")
        assert p > EXACT
        if params is GREEDY:
            assert law.max() == 1 and (part == part[0]).all()


def test_equal_q_and_p_are_always_accepted():
    for params in (REJECTION, Params(temperature=0.6, top_p=0.7)):
        rows = sampling_rows([params] * 20_000, torch.arange(20_000))
        emitted = emit(Tabular(4, context=0.0), rows, 1 + 1 + 4 * 3, 4)
        # The prefill's token, one cold step, then four tokens per forward.
        assert (emitted.forwards == 1 + 3).all()


# What must fail -----------------------------------------------------------------------------------------------------


def relaxed_acceptance(patch):
    """Accept with p / (0.8 q)."""
    exact = step.accepted_by_rejection
    patch(step, "accepted_by_rejection", lambda scores, q, *rest: exact(scores, q * 0.8, *rest))


def strict_acceptance(patch):
    """Accept with p / (1.2 q)."""
    exact = step.accepted_by_rejection
    patch(step, "accepted_by_rejection", lambda scores, q, *rest: exact(scores, q * 1.2, *rest))


def correction_from_p(patch):
    """Correct from p instead of max(0, p - q)."""
    patch(step, "residual", lambda scores, q, rejected: scores)


def bonus_from_residual(patch):
    """The bonus is drawn as if its draft had been rejected."""
    exact = step.residual
    patch(step, "residual", lambda scores, q, rejected: exact(scores, q, torch.ones_like(rejected)))


def q_at_the_wrong_temperature(patch):
    """Drafts are drawn from q and scored with q^2 renormalised: the temperature applied twice."""

    def wrong(scores, *rest):
        exact = propose.propose(scores, *rest)
        return replace(exact, q=torch.softmax(exact.q.log() * 2, dim=-1))

    patch(step, "propose", wrong)


def argmax_scored_as_sampled(patch):
    """Drafts are the argmax of q and scored as draws from it."""
    patch(step, "propose", lambda scores, chosen, *rest: propose.propose(scores, scores.argmax(-1), *rest))


def repeated_acceptance_draws(patch):
    """One acceptance draw for all positions of a request."""
    exact = noise.uniform
    patch(noise, "uniform", lambda seeds, positions, stream: exact(seeds, positions * 0, stream))


def correction_with_the_drafts_noise(patch):
    """The correction reuses the noise that drew the draft it replaces."""
    patch(noise, "STREAM_FINAL", noise.STREAM_TOKEN)


def noise_without_positions(patch):
    """The same token noise at every position."""
    exact = noise.gumbel
    patch(noise, "gumbel", lambda seeds, positions, *rest: exact(seeds, positions * 0, *rest))


def p_at_the_wrong_temperature(patch):
    """Drafts are accepted by p at twice the temperature."""
    exact = step.accepted_by_rejection
    patch(step, "accepted_by_rejection", lambda scores, *rest: exact((scores / 2).log_softmax(-1), *rest))


def tried_behind_the_first_rejection(patch):
    """Accepted drafts behind a rejected one count."""
    patch(step, "leading", lambda accepted: accepted.sum(1))


def invalid_drafts_tried(patch):
    """Columns behind the count are tried as if they held drafts."""
    patch(step, "valid_drafts", lambda counts, k: torch.ones(len(counts), k, dtype=torch.bool))


DEVIATIONS = [
    relaxed_acceptance,
    strict_acceptance,
    correction_from_p,
    bonus_from_residual,
    q_at_the_wrong_temperature,
    argmax_scored_as_sampled,
    repeated_acceptance_draws,
    correction_with_the_drafts_noise,
    noise_without_positions,
    p_at_the_wrong_temperature,
    tried_behind_the_first_rejection,
    invalid_drafts_tried,
]


@pytest.mark.parametrize("deviation", DEVIATIONS, ids=lambda deviation: deviation.__name__)
def test_a_biased_procedure_is_noticed(deviation, monkeypatch):
    deviation(monkeypatch.setattr)
    assert check(deviation.__name__, Tabular(3, seed=1), REJECTION, 4, 3, seed=11, rows=FEW) < BIASED


def test_untruncated_verification_is_noticed(monkeypatch):
    """Top-k for the drafts and the bonus, not for p in verification and correction."""
    exact = step.target_scores

    def wrong(logits, rows):
        k = logits.shape[1] // 2
        return torch.cat([exact(logits[:, :k], replace(rows, any_truncated=False)), exact(logits[:, k:], rows)], dim=1)

    monkeypatch.setattr(step, "target_scores", wrong)
    assert check("untruncated verification", Tabular(3, seed=1), Params(top_k=2), 4, 3, seed=11, rows=FEW) < BIASED


def test_coupled_noise_without_positions_is_noticed(monkeypatch):
    noise_without_positions(monkeypatch.setattr)
    assert check("coupled, same noise everywhere", Tabular(3, seed=1), COUPLED, 4, 3, seed=11, rows=FEW) < BIASED


def test_dropping_drafts_by_their_own_probability_is_noticed():
    """Keeping a draft because of q at its value biases the rejection rule; the coupled rule does not mind."""
    sure = lambda result: result.proposal.counts * (result.proposal.log_q[:, 0] > -0.7)
    model = Tabular(3, seed=1)
    assert check("dropped by q(x), rejection", model, REJECTION, 4, 3, seed=12, rows=FEW, survivors=sure) < BIASED
    assert check("dropped by q(x), coupled", model, COUPLED, 4, 3, seed=12, survivors=sure) > EXACT


@pytest.mark.parametrize("salvage", [OFF, BRANCH, CHAIN])
def test_mask_rows_left_out_by_drafts_to_be_tried_are_noticed(salvage):
    """Also by those that were cut from what a step had drawn: their noise draws again."""
    by_values = lambda drafts, counts, run: (drafts.sum(1) + counts) % (drafts.shape[1] + 1)
    model = Tabular(3, order=7, seed=5, context=0.3)
    assert check(f"MASK rows by values, {salvage}", model, REJECTION, 6, 4, seed=13, rows=FEW, salvage=salvage, masks=by_values) < BIASED


def test_a_wrong_law_is_noticed():
    """The test tells temperatures 1.0 and 1.03 apart at this number of samples."""
    model = Tabular(3, seed=1)
    emitted = emit(model, sampling_rows([REJECTION] * ROWS, torch.arange(ROWS)), 4, 3)
    assert report("temperature 1.03", emitted, 3, model.law(Params(temperature=1.03), 4)) < BIASED
