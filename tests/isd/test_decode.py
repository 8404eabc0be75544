"""The plain loop: where it stops, what it counts, and that it is AR at any stride."""

import pytest
import torch

from idlm_sglang.isd import decode as loop
from idlm_sglang.isd.decode import decode, one_row
from tests.isd.reference import Params, Tabular, emit, sampling_rows

MODEL = Tabular(11, order=3, seed=2, context=0.4)
SETTINGS = {
    "greedy": dict(),
    "coupled": dict(temperature=0.9, top_p=0.9, seed=5, coupled=True),
    "rejection": dict(temperature=1.0, seed=-3),
}


class Counting:
    """The model, and how often and with how many new rows it was called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, tokens, positions):
        self.calls += 1
        return MODEL(tokens, positions)


def run(stride, max_tokens=40, stop_ids=frozenset(), model=MODEL, **settings):
    return decode(model, MODEL.prompt, stride, MODEL.mask, one_row(**settings), max_tokens, stop_ids)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", SETTINGS)
def test_counts_add_up(name, stride):
    model = Counting()
    out = run(stride, model=model, **SETTINGS[name])
    assert len(out.tokens) == 40 and MODEL.mask not in out.tokens
    assert model.calls == out.forwards + 1
    assert out.tokens_per_forward == pytest.approx(39 / out.forwards)
    # Each forward commits its accepted drafts and one more token; the last may be cut.
    committed = 1 + out.forwards + sum(out.accepted)
    assert 0 <= committed - len(out.tokens) < stride
    assert len(out.proposed) == len(out.accepted) == stride - 1
    assert all(a <= p for a, p in zip(out.accepted, out.proposed, strict=True))
    assert out.accepted == sorted(out.accepted, reverse=True) and out.proposed == sorted(out.proposed, reverse=True)
    assert sum(out.accepted) <= out.tried <= sum(out.proposed) and 0 <= out.introspection <= out.tried + 1e-4
    if stride == 1:
        assert out.forwards == 39 and out.tried == 0 and out.tokens_per_forward == 1


@pytest.mark.parametrize("name", ["greedy", "coupled"])
def test_every_stride_gives_the_text_of_stride_one(name):
    plain = run(1, **SETTINGS[name])
    for stride in (2, 3, 4, 8, 16):
        out = run(stride, **SETTINGS[name])
        assert out.tokens == plain.tokens
    print(f"{name}: {out.tokens_per_forward:.2f} tokens per forward at N = 16")


def test_greedy_at_stride_one_is_the_argmax_of_a_plain_loop():
    tokens = list(MODEL.prompt)
    for _ in range(40):
        tokens.append(
            int(MODEL(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0, -1, : MODEL.vocab].argmax())
        )
    assert run(1).tokens == tokens[len(MODEL.prompt) :]


@pytest.mark.parametrize("stride", [1, 3, 4])
def test_the_loop_and_the_batched_simulation_agree(stride):
    """Two harnesses around the same step: a slip in either one's bookkeeping shows."""
    for name, params in (("coupled", Params(0.9, top_p=0.9, coupled=True)), ("rejection", Params())):
        seed = SETTINGS[name]["seed"]
        wanted = emit(MODEL, sampling_rows([params], torch.tensor([seed])), 40, stride)
        out = run(stride, **SETTINGS[name])
        assert out.tokens == wanted.tokens[0].tolist() and out.forwards == int(wanted.forwards[0])


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_it_stops_at_the_first_end_token_or_the_limit(name, stride):
    """Every token of the text as the end token, so that ends fall inside accepted runs too; every limit."""
    full = run(stride, max_tokens=30, **SETTINGS[name]).tokens
    for token in range(MODEL.vocab):
        out = run(stride, max_tokens=30, stop_ids=frozenset([token, 99]), **SETTINGS[name])
        assert out.tokens == full[: full.index(token) + 1 if token in full else 30]
    for max_tokens in range(1, 12):
        assert run(stride, max_tokens=max_tokens, **SETTINGS[name]).tokens == full[:max_tokens]


@pytest.mark.parametrize("name", SETTINGS)
def test_statistics_are_those_of_the_steps(name, monkeypatch):
    steps = []
    exact = loop.isd_step

    def spy(logits, drafts, counts, *rest):
        result = exact(logits, drafts, counts, *rest)
        steps.append((int(counts), int(result.accept_lens) - 1, float(result.introspection)))
        return result

    monkeypatch.setattr(loop, "isd_step", spy)
    out = run(4, **SETTINGS[name])
    assert out.forwards == len(steps) - 1
    assert out.proposed == [sum(counts > i for counts, _, _ in steps) for i in range(3)]
    assert out.accepted == [sum(accepted > i for _, accepted, _ in steps) for i in range(3)]
    assert out.tried == sum(min(counts, accepted + 1) for counts, accepted, _ in steps)
    assert out.introspection == pytest.approx(sum(value for _, _, value in steps))
    print(
        f"{name}: {out.accepted} of {out.proposed} accepted, introspective acceptance {out.introspection / out.tried:.3f}"
    )


def test_an_end_token_from_the_prefill_takes_no_forward():
    first = run(1, max_tokens=1).tokens
    out = run(4, stop_ids=frozenset(first))
    assert out.tokens == first and out.forwards == 0 and out.tokens_per_forward == 0.0
    assert run(4, max_tokens=1).forwards == 0


def test_the_mask_token_is_never_emitted_and_the_models_tensors_stay_untouched():
    """A model that prefers MASK everywhere and returns its own storage."""
    stored = torch.zeros(1, 64, 5)
    stored[..., 4] = 50.0
    before = stored.clone()
    for params in (dict(), dict(temperature=1.0), dict(temperature=1.0, coupled=True, top_k=3)):
        out = decode(lambda tokens, positions: stored[:, : tokens.shape[1]], [0, 1], 3, 4, one_row(**params), 20)
        assert len(out.tokens) == 20 and 4 not in out.tokens
        assert out.introspection == pytest.approx(out.tried, abs=1e-3)
    assert torch.equal(stored, before)


def test_equal_q_and_p_give_n_tokens_per_forward():
    flat = Tabular(6, order=2, context=0.0)
    for stride in (2, 3, 4):
        out = decode(flat, flat.prompt, stride, flat.mask, one_row(temperature=1.0, seed=1), 2 + 20 * stride)
        assert out.forwards == 21 and out.introspection == pytest.approx(out.tried)
        assert out.accepted == out.proposed == [20] * (stride - 1)


def test_one_row_sets_the_flags_of_its_request():
    flags = lambda **settings: (lambda rows: (rows.any_sampled, rows.any_truncated, rows.any_rejection))(
        one_row(**settings)
    )
    assert flags() == flags(top_p=0.5, coupled=True) == (False, False, False)
    assert flags(temperature=1.0) == (True, False, True)
    assert flags(temperature=1.0, coupled=True) == (True, False, False)
    assert (
        flags(temperature=1.0, top_k=5)
        == flags(temperature=1.0, top_p=0.9)
        == flags(temperature=1.0, min_p=0.1)
        == (True, True, True)
    )
    assert bool(one_row().greedy) and not bool(one_row(temperature=0.1).greedy)
