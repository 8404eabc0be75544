"""The coupled rule and greedy decoding: the text is AR's own, the same at any stride, batch, order and mate."""

from itertools import cycle

import numpy as np
import pytest
import torch

from idlm_sglang.isd import noise
from tests.isd.reference import GREEDY, Params, Tabular, emit, sampling_rows, target_probs

LENGTH = 48
STRIDES = (1, 2, 3, 4, 8, 16)
COUPLED = [
    Params(coupled=True),
    Params(temperature=0.7, top_p=0.8, coupled=True),
    Params(temperature=1.4, top_k=9, min_p=0.05, coupled=True),
    Params(top_k=40, top_p=0.95, coupled=True),
    Params(temperature=0.3, coupled=True),
    GREEDY,
]
MATES = [Params(), Params(temperature=0.8, top_k=3), GREEDY, Params(coupled=True, min_p=0.2)]


@pytest.fixture(scope="module")
def model():
    """Odd vocabulary; q near p, so that runs of every length occur."""
    return Tabular(37, order=2, seed=7, context=0.08, spread=1.8)


@pytest.fixture(scope="module")
def requests():
    params = COUPLED * 8
    return params, torch.randint(-(2**62), 2**62, (len(params),), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def alone(model, requests):
    """Plain AR in numpy, one request after another: argmax of log p plus the position's noise."""
    texts = []
    for params, seed in zip(*requests, strict=True):
        context, text = model.prompt[-2:], []
        for step in range(LENGTH):
            p = target_probs(model.logits(torch.tensor([context]))[0, :, : model.vocab].numpy(), params)[0]
            if params.top_k == 1:
                token = int(np.argmax(p))
            else:
                position = torch.tensor([[len(model.prompt) - 1 + step]])
                g = noise.gumbel(seed[None], position, model.vocab + 1)[0, 0, : model.vocab].double().numpy()
                token = int(np.argmax(np.where(p > 0, np.log(np.where(p > 0, p, 1)) + g, -np.inf)))
            text.append(token)
            context = [context[1], token]
        texts.append(text)
    return torch.tensor(texts)


@pytest.mark.parametrize("stride", STRIDES)
def test_the_text_is_that_of_ar_at_any_stride(model, requests, alone, stride):
    params, seeds = requests
    emitted = emit(model, sampling_rows(params, seeds), LENGTH, stride)
    rate = (LENGTH - 1) / float(emitted.forwards.double().mean())
    print(f"N = {stride}: {len(params)} requests of {LENGTH} tokens, {rate:.2f} tokens per forward")
    assert torch.equal(emitted.tokens, alone)
    assert stride == 1 or rate > 1.7


def test_the_text_is_that_of_ar_while_stride_and_limits_change(model, requests, alone):
    params, seeds = requests
    random = torch.Generator().manual_seed(4)
    limits = lambda batch, k: torch.randint(0, k + 1, (batch,), generator=random)
    for strides in (4, cycle([3, 1, 8, 2, 4])):
        assert torch.equal(emit(model, sampling_rows(params, seeds), LENGTH, strides, limits).tokens, alone)


def test_the_text_may_drop_drafts_by_their_value(model, requests, alone):
    """Allowed here, and not under rejection (test_distribution)."""
    params, seeds = requests
    even = lambda result: result.proposal.counts * (result.proposal.drafts[:, 0] % 2)
    assert torch.equal(emit(model, sampling_rows(params, seeds), LENGTH, 4, survivors=even).tokens, alone)


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_the_text_does_not_depend_on_the_batch(model, requests, alone, stride):
    """Alone, reordered, and beside mates that truncate, reject drafts or are greedy."""
    params, seeds = requests
    for one in range(len(COUPLED)):
        rows = sampling_rows(params[one : one + 1], seeds[one : one + 1])
        assert torch.equal(emit(model, rows, LENGTH, stride).tokens, alone[one : one + 1])
    order = torch.randperm(len(params), generator=torch.Generator().manual_seed(2))
    mates = MATES * 5
    mixed = [params[i] for i in order.tolist()] + mates
    mixed_seeds = torch.cat([seeds[order], torch.arange(len(mates))])
    shuffle = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(3))
    tokens = emit(
        model, sampling_rows([mixed[i] for i in shuffle.tolist()], mixed_seeds[shuffle]), LENGTH, stride
    ).tokens
    back = torch.empty_like(shuffle).scatter_(0, shuffle, torch.arange(len(mixed)))
    assert torch.equal(tokens[back][: len(params)], alone[order])


@pytest.mark.parametrize("stride", STRIDES)
def test_greedy_text_is_that_of_ar_with_ties(stride):
    """Logits on a coarse grid: about half of the rows have several maxima, and the lowest id wins."""
    forwards, tied = 0, []
    models = [Tabular(23, order=2, seed=seed, step=0.5, context=0.35) for seed in range(8)]
    for model in models:
        tied.append(float(((model.table == model.table.amax(-1, keepdim=True)).sum(-1) > 1).double().mean()))
        context, wanted = model.prompt[-2:], []
        for _ in range(LENGTH):
            row = model.logits(torch.tensor([context]))[0, 0].tolist()
            wanted.append(row.index(max(row)))
            context = [context[1], wanted[-1]]
        # Alone the batch has no noise at all; beside sampled mates the greedy request takes the general path.
        for params in ([GREEDY], [GREEDY, Params(coupled=True), Params(temperature=0.5, top_p=0.9)]):
            emitted = emit(model, sampling_rows(params, torch.arange(len(params))), LENGTH, stride)
            assert emitted.tokens[0].tolist() == wanted
        forwards += int(emitted.forwards[0])
    rate, share = len(models) * (LENGTH - 1) / forwards, sum(tied) / len(tied)
    print(f"N = {stride}: {share:.0%} of the rows have tied maxima, {rate:.2f} tokens per forward")
    assert share > 0.2 and (stride == 1 or rate > 1.1)


def test_equal_seeds_give_equal_text_and_different_seeds_do_not(model):
    seeds = torch.tensor([5, 5, 6, 5 << 32, -5, 5 + 2**32])
    tokens = emit(model, sampling_rows([Params(coupled=True)] * 6, seeds), LENGTH, 3).tokens
    assert torch.equal(tokens[0], tokens[1])
    assert len({tuple(text) for text in tokens.tolist()}) == 5
