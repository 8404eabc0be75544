"""Some requests at a time give what all at once give, and no more than so many values are made on the way."""

from dataclasses import fields, is_dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from idlm_sglang.isd import first_proposal, isd_step, parts
from idlm_sglang.isd.tables import StepTables
from tests.isd.reference import GREEDY, Params, sampling_rows

KINDS = [GREEDY, Params(temperature=0.7), Params(coupled=True, top_k=9), Params(coupled=True, top_p=0.8), Params(top_p=0.6, min_p=0.02), Params(coupled=True)]
K, VOCAB, BATCH = 3, 40, 11


def arguments(kinds):
    random = torch.Generator().manual_seed(5)
    counts = torch.randint(0, K + 1, (BATCH,), generator=random)
    drafts, q = torch.randint(0, VOCAB, (BATCH, K), generator=random), torch.rand(BATCH, K, VOCAB, generator=random).softmax(-1)
    limits, seq_lens = torch.randint(0, K + 1, (BATCH,), generator=random), torch.randint(1, 500, (BATCH,), generator=random)
    rows = sampling_rows([kinds[i % len(kinds)] for i in range(BATCH)], torch.arange(BATCH) * 977)
    logits = torch.randn(BATCH, 2 * K + 1, VOCAB, generator=random) * 2
    return logits, drafts, counts, q.gather(-1, drafts[..., None])[..., 0].log(), q if rows.any_rejection else None, limits, seq_lens, rows


def equal(one, other) -> None:
    assert type(one) is type(other)
    if is_dataclass(one):
        for field in fields(one):
            equal(getattr(one, field.name), getattr(other, field.name))
    elif one is not None:
        assert one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("kinds", [KINDS, [GREEDY, Params(coupled=True)]])
@pytest.mark.parametrize("at_once", [1, 2, 4, 10, 11])
def test_a_step_in_parts_is_the_step(monkeypatch, at_once, kinds):
    logits, *rest, rows = arguments(kinds)
    forks, masks = rest[1] - rest[1] // 2, torch.full((BATCH,), K)
    whole = isd_step(logits.clone(), *rest, rows, forks, True, StepTables(K, "cpu"), masks)
    first = first_proposal(logits[:, :K].clone(), rest[4], rest[5], rows, True)
    seen = []
    monkeypatch.setattr(parts, "CELLS", at_once * logits[0].numel())
    equal(parts.in_parts(lambda *args: seen.append(len(args[0])) or isd_step(*args), logits.clone(), *rest, rows, forks, True, StepTables(K, "cpu"), masks), whole)
    assert sum(seen) == BATCH and max(seen) <= at_once
    equal(parts.in_parts(first_proposal, logits[:, :K].clone(), rest[4], rest[5], rows, True), first)


def test_a_request_larger_than_a_part_goes_by_itself(monkeypatch):
    monkeypatch.setattr(parts, "CELLS", 10)
    assert list(parts.parts(3, 1000)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(parts.parts(3, 6)) == [slice(0, 1), slice(1, 2), slice(2, 3)], "two would be more than a part"
    assert list(parts.parts(0, 1000)) == [] and list(parts.parts(5, 2)) == [slice(0, 5)] and list(parts.parts(6, 2)) == [slice(0, 3), slice(3, 6)]


class Largest(TorchDispatchMode):
    """How many values the largest tensor has that an operation makes."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.found = max(self.found, out.numel())
        return out


def test_no_operation_makes_more_than_a_part_s_values(monkeypatch):
    logits, *rest, rows = arguments([Params(coupled=True, top_p=0.8), GREEDY])
    with Largest() as whole:
        isd_step(logits, *rest, rows)
    monkeypatch.setattr(parts, "CELLS", 4 * logits[0].numel())
    with Largest() as bounded:
        parts.in_parts(isd_step, logits, *rest, rows)
    assert whole.found >= logits.numel() and bounded.found <= parts.CELLS
