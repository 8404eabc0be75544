"""What the ranks of a tensor-parallel group must not differ in is the first one's."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from idlm_sglang.engine.ranks import Ranks
from idlm_sglang.isd import isd_step
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
        assert torch.equal(getattr(second, name), getattr(one, name)) and getattr(second, name).dtype == getattr(other, name).dtype
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
