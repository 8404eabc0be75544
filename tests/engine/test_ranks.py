"""What the ranks of a tensor-parallel group must not differ in is the first one's."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from idlm_sglang.config import CHAIN, TORCH
from idlm_sglang.engine import step_ops, strided
from idlm_sglang.engine.ranks import Ranks
from idlm_sglang.engine.spec_io import IsdVerifyInput
from idlm_sglang.engine.strided import StridedStep
from idlm_sglang.engine.warm import first_drafts
from idlm_sglang.isd import isd_step, parts
from tests.engine.test_no_sync import BATCH, VOCAB, K, fake_batch, fake_rows, fake_worker
from tests.isd.test_parts import KINDS, arguments, equal


class Group:
    """Of two ranks: the first says, the second hears what was said last."""

    world_size = 2

    def __init__(self):
        self.rank, self.said, self.calls = 0, [], 0

    def broadcast(self, tensor, src):
        assert src == 0
        self.calls += 1
        if self.rank == 0:
            self.said.append(tensor.clone())
        else:
            tensor.copy_(self.said.pop(0))
        return tensor


def steps():
    """Of two ranks whose logits are not quite the same."""
    logits, *rest, rows = arguments(KINDS)
    nudged = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    return isd_step(logits, *rest, rows, None, True), isd_step(nudged, *rest, rows, None, True)


def test_the_second_rank_goes_on_with_the_firsts_tokens_and_drafts():
    group = Group()
    one, other = steps()
    assert not torch.equal(one.accept_lens, other.accept_lens), "the ranks would have come apart"
    first = Ranks(group).step(one)
    group.rank = 1
    second = Ranks(group).step(other)
    equal(first, replace(one, last=first.last))
    assert torch.equal(first.last, one.last)
    for name in ("tokens", "accept_lens", "last", "deciding"):
        assert torch.equal(getattr(second, name), getattr(one, name)) and getattr(second, name).dtype == getattr(other, name).dtype and getattr(second, name).is_contiguous()
    for name in ("drafts", "counts", "clean"):
        assert torch.equal(getattr(second.proposal, name), getattr(one.proposal, name))
    assert torch.equal(second.proposal.log_q, other.proposal.log_q)


def test_so_with_first_drafts():
    group = Group()
    one, other = (step.proposal for step in steps())
    Ranks(group).drafts(one)
    group.rank = 1
    second = Ranks(group).drafts(other)
    assert torch.equal(second.drafts, one.drafts) and torch.equal(second.counts, one.counts) and torch.equal(second.clean, one.clean)


def test_one_rank_asks_nobody():
    one, _ = steps()
    for group in (None, SimpleNamespace(world_size=1)):
        assert Ranks(group).step(one) is one and Ranks(group).drafts(one.proposal) is one.proposal


WIDTH = 2 * K + 1


def logits_of(rank: int) -> torch.Tensor:
    return torch.randn(BATCH * WIDTH, VOCAB, generator=torch.Generator().manual_seed(rank)) * 3


def worker_of(group, rank: int):
    group.rank = rank
    worker = fake_worker("cpu", logits_of(rank).clone(), CHAIN, TORCH)
    worker.ranks = Ranks(group)
    return worker


def a_step(worker):
    step = StridedStep(worker, fake_batch("cpu"), fake_rows("cpu", False), CHAIN)
    result = step.finish(*step.verify())
    return result.next_token_ids, result.accept_lens, result.new_seq_lens, worker.state._table, worker.counts.counts


@pytest.fixture
def no_engine(monkeypatch):
    monkeypatch.setattr(IsdVerifyInput, "prepare_for_verify", lambda *_, **__: (None, False))


def test_a_workers_ranks_keep_and_count_the_same(no_engine):
    alone, group = [a_step(worker_of(SimpleNamespace(world_size=1), rank)) for rank in (0, 1)], Group()
    assert not torch.equal(alone[0][0], alone[1][0])
    for one, mine, told in zip(alone[0], a_step(worker_of(group, 0)), a_step(worker_of(group, 1)), strict=True):
        assert torch.equal(one, mine) and torch.equal(one, told)


def test_a_workers_ranks_begin_with_the_same_drafts(no_engine):
    def table(group, rank):
        worker = worker_of(group, rank)
        first_drafts(worker, fake_batch("cpu"), [0, 2], fake_rows("cpu", False), logits_of(rank)[: 2 * K])
        return worker.state._table

    alone, group = [table(SimpleNamespace(world_size=1), rank) for rank in (0, 1)], Group()
    assert not torch.equal(*alone)
    assert torch.equal(table(group, 0), alone[0]) and torch.equal(table(group, 1), alone[0])


def test_a_worker_samples_and_penalises_in_parts(no_engine, monkeypatch):
    sizes = {"isd_step": [], "penalise": []}
    for module, name in ((step_ops, "isd_step"), (strided, "penalise")):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda logits, *rest, whole=whole, name=name: sizes[name].append(len(logits)) or whole(logits, *rest))
    one = SimpleNamespace(world_size=1)
    at_once = a_step(worker_of(one, 0))
    assert sizes == {"isd_step": [BATCH], "penalise": [2]}
    monkeypatch.setattr(parts, "CELLS", WIDTH * VOCAB)
    for a, b in zip(at_once, a_step(worker_of(one, 0)), strict=True):
        assert torch.equal(a, b)
    assert sizes == {"isd_step": [BATCH, *[1] * BATCH], "penalise": [2, 1, 1]}
