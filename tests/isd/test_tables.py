"""What a step looks up is what its definitions say, for every count, fork and run."""

import pytest
import torch

from idlm_sglang.isd.layout import mask_rows, row_offsets, step_tokens, visible_rows
from idlm_sglang.isd.tables import StepTables

MASK = 999


def pairs(k, all_runs):
    """(first, forks) tensors: counts and forks, forks being no more, or runs and forks."""
    found = [(first, fork) for first in range(k + 1) for fork in range(k + 1) if all_runs or fork <= first]
    return torch.tensor(found).T.contiguous()


@pytest.mark.parametrize("k", range(6))
def test_rows_are_those_of_the_layout(k):
    tables, width = StepTables(k, "cpu"), 2 * k + 1
    counts, forks = pairs(k, all_runs=False)
    pair = tables.pair(counts.to(torch.int32), forks)
    pending = torch.arange(len(counts)) + 100
    drafts = torch.arange(1, k + 1).expand(len(counts), k)
    source, offsets = tables.rows[pair].split(width, dim=1)
    read = torch.cat([pending[:, None], drafts, torch.full((len(counts), 1), MASK)], 1).gather(1, source)
    assert torch.equal(read, step_tokens(pending, drafts, counts, MASK))
    assert torch.equal(offsets, row_offsets(counts, forks, width))
    assert torch.equal(tables.visible[pair], visible_rows(counts, forks, width))
    verifying = torch.arange(k + 1).expand(len(counts), -1)
    assert torch.equal(tables.reads[pair], torch.cat([verifying, mask_rows(counts, k)], 1))
    assert torch.equal(tables.ahead[pair], torch.cat([verifying, mask_rows(forks, k)], 1))


@pytest.mark.parametrize("k", range(6))
def test_next_drafts_are_the_spine_behind_the_run(k):
    """Along the spine (pending, drafts 1 .. f, the MASK rows) entry s predicts the token at s + 1: those behind the run are kept, as far as it goes."""
    tables = StepTables(k, "cpu")
    for run, fork in pairs(k, all_runs=True).T.tolist():
        spine = [*range(fork + 1), *range(k + 1, 2 * k + 1)]  # among the rows that are read
        kept = spine[run + 1 : run + 1 + k]
        ahead, clean, *index = tables.next[tables.pair(torch.tensor([run]), torch.tensor([fork]))][0].tolist()
        assert ahead == len(kept) and index[:ahead] == kept and all(0 <= i <= 2 * k for i in index)
        assert clean == (ahead if run >= fork else 0)
