"""What survives a rejection: AR's own text or distribution, with strides and limits that change, and more tokens per forward."""

from itertools import cycle

import pytest
import torch

from idlm_sglang.isd import BRANCH, CHAIN, OFF, propose, step
from idlm_sglang.isd.decode import decode, one_row
from idlm_sglang.isd.verify import take
from tests.isd.reference import GREEDY, Params, Tabular, emit, sampling_rows
from tests.isd.test_distribution import BIASED, COUPLED, EXACT, FEW, MODELS, REJECTION, TRUNCATED, check

LENGTH = 48
KINDS = [GREEDY, COUPLED, Params(temperature=0.7, top_p=0.8, coupled=True), Params(temperature=1.4, top_k=9, min_p=0.05, coupled=True)]


def random_limits(seed: int):
    random = torch.Generator().manual_seed(seed)
    return lambda batch, k: torch.randint(0, k + 1, (batch,), generator=random)


@pytest.fixture(scope="module")
def model():
    return Tabular(37, order=2, seed=7, context=0.15, spread=1.8)


@pytest.fixture(scope="module")
def requests():
    params = KINDS * 10
    return sampling_rows(params, torch.randint(-(2**62), 2**62, (len(params),), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("stride, salvage", [*((n, BRANCH) for n in (2, 3, 4, 8, 16)), (4, CHAIN), (8, CHAIN)])
def test_the_text_is_that_of_ar_and_takes_fewer_forwards(model, requests, stride, salvage):
    plain, cold, kept = (emit(model, requests, LENGTH, n, salvage=s) for n, s in ((1, OFF), (stride, OFF), (stride, salvage)))
    rates = [(LENGTH - 1) / float(e.forwards.double().mean()) for e in (cold, kept)]
    print(f"N = {stride}: {rates[0]:.2f} tokens per forward, {salvage} {rates[1]:.2f}; {int(kept.salvaged.sum())} survivors accepted")
    assert torch.equal(kept.tokens, plain.tokens)
    assert int(kept.salvaged.sum()) > 0 == int(cold.salvaged.sum()) and rates[1] > rates[0]


@pytest.mark.parametrize("salvage", [BRANCH, CHAIN])
def test_the_text_is_that_of_ar_while_stride_and_limits_change(model, requests, salvage):
    plain = emit(model, requests, LENGTH, 1).tokens
    for strides in (4, 8, cycle([3, 1, 8, 2, 4])):
        changed = emit(model, requests, LENGTH, strides, random_limits(4), salvage=salvage)
        assert torch.equal(changed.tokens, plain) and int(changed.salvaged.sum()) > 0


def test_it_may_be_switched_between_steps(model, requests, monkeypatch):
    """A survivor that meets a step without salvage is verified as any draft."""
    exact, switch = step.propose, cycle([True, False, True, True, False])
    monkeypatch.setattr(step, "propose", lambda *args: exact(*args[:6], next(switch), *args[7:]))
    assert torch.equal(emit(model, requests, LENGTH, 4).tokens, emit(model, requests, LENGTH, 1).tokens)


@pytest.mark.parametrize("name, salvage", [*((name, BRANCH) for name in MODELS), ("unrelated q", CHAIN), ("q with zeros", CHAIN)])
def test_rejection_emits_the_ar_distribution(name, salvage):
    assert check(f"{salvage}, {name}, N = 3", Tabular(3, **MODELS[name]), REJECTION, 5, 3, seed=21, salvage=salvage) > EXACT


@pytest.mark.parametrize("stride, salvage", [(2, BRANCH), (4, BRANCH), (4, CHAIN)])
def test_several_rejections_in_a_row_emit_the_ar_distribution(stride, salvage):
    """A q near p: survivors and what is drawn beside them are accepted, and the joint law spans several rounds."""
    model = Tabular(3, order=7, seed=5, context=0.5)
    assert check(f"{salvage}, q near p, N = {stride}", model, REJECTION, 7, stride, seed=22, salvage=salvage) > EXACT


@pytest.mark.parametrize("name", ["top-p", "top-k and min-p"])
def test_sampling_parameters_shape_the_survivors_q_too(name):
    assert check(f"salvage, {name}", Tabular(4, order=4, seed=2), Params(**TRUNCATED[name]), 4, 3, seed=23, salvage=BRANCH) > EXACT


def test_coupled_emits_the_ar_distribution():
    assert check("salvage, coupled", Tabular(3), COUPLED, 5, 3, seed=24, salvage=BRANCH) > EXACT


@pytest.mark.parametrize("salvage", [BRANCH, CHAIN])
def test_changing_strides_and_limits_keep_the_distribution(salvage):
    model, strides = Tabular(3, seed=3, context=0.6), cycle([3, 4, 2, 4, 1, 3])
    assert check(f"{salvage}, random limits and strides", model, REJECTION, 5, strides, seed=26, limits=random_limits(1), salvage=salvage) > EXACT


@pytest.mark.parametrize("settings", [dict(), dict(temperature=0.9, top_p=0.9, seed=5, coupled=True), dict(temperature=1.0, seed=-3)])
@pytest.mark.parametrize("stride, salvage", [(2, BRANCH), (4, BRANCH), (8, BRANCH), (4, CHAIN)])
def test_the_plain_loop_and_the_batched_simulation_agree(stride, salvage, settings):
    """The loop hides columns from rows of one forward; the simulation writes each branch out as texts of its own."""
    model = Tabular(11, order=3, seed=2, context=0.4)
    sampled = "temperature" in settings
    params = Params(settings["temperature"], top_p=settings.get("top_p", 1.0), coupled=settings.get("coupled", False)) if sampled else GREEDY
    wanted = emit(model, sampling_rows([params], torch.tensor([settings.get("seed", 0)])), 40, stride, salvage=salvage)
    out = decode(model, model.prompt, stride, model.mask, one_row(**settings), 40, salvage=salvage)
    assert out.tokens == wanted.tokens[0].tolist() and out.forwards == int(wanted.forwards[0])
    if settings.get("coupled") or not sampled:
        assert out.tokens == decode(model, model.prompt, 1, model.mask, one_row(**settings), 40).tokens
    assert sum(out.salvage_proposed) > 0 and 0 <= 1 + out.forwards + sum(out.accepted) + sum(out.salvage_accepted) - 40 < stride


# What must fail -----------------------------------------------------------------------------------------------------


def noticed(name: str) -> float:
    return check(name, Tabular(3, seed=1, context=0.7), REJECTION, 5, 4, seed=27, rows=2 * FEW, salvage=BRANCH)


def test_without_a_planted_bug_the_same_run_is_exact():
    assert noticed("none planted") > EXACT


def test_q_that_stays_behind_is_noticed(monkeypatch):
    """Drafts move to the front and their q does not."""
    exact = step.propose

    def wrong(scores, chosen, *rest):
        found = exact(scores, chosen, *rest)
        k = chosen.shape[1] // 2
        return propose.Proposal(found.drafts, found.counts, found.log_q, scores[:, k + 1 :].exp(), found.clean)

    monkeypatch.setattr(step, "propose", wrong)
    assert noticed("q stays behind") < BIASED


def test_survivors_kept_by_their_value_are_noticed(monkeypatch):
    exact = step.propose

    def wrong(scores, chosen, *rest):
        found = exact(scores, chosen, *rest)
        branch = found.clean < found.counts
        unlikely = branch & (take(found.q, found.drafts) < 0.4)[:, :1].any(1)
        return propose.Proposal(found.drafts, torch.where(unlikely, 0, found.counts), found.log_q, found.q, found.clean.masked_fill(unlikely, 0))

    monkeypatch.setattr(step, "propose", wrong)
    assert noticed("kept by value") < BIASED


def test_mask_rows_that_see_survivors_are_noticed(monkeypatch):
    """What they draw is kept when a survivor they saw was never tried."""
    exact = Tabular.step_logits
    model = Tabular(3, seed=1, spread=2.5)
    assert check("survivors hidden", model, REJECTION, 7, 3, seed=27, salvage=BRANCH) > EXACT
    monkeypatch.setattr(Tabular, "step_logits", lambda self, window, pending, drafts, counts, forks: exact(self, window, pending, drafts, counts, counts))
    assert check("MASK rows see survivors", model, REJECTION, 7, 3, seed=27, salvage=BRANCH) < BIASED
