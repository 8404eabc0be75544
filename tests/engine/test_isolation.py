"""A forward under ISD leaves a batch as it was, as SGLang's own isolation does."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from idlm_sglang.compat import isolation


def _info(penalised: bool) -> SamplingBatchInfo:
    one = torch.ones(1, 1)
    info = SamplingBatchInfo(one, one, one, one, True, True, False, False, False, 8, grammars=[None], logit_bias=one, device="cpu")
    penalise = lambda buffer: buffer.add_(1.0)  # noqa: E731
    orchestrator = SimpleNamespace(is_required=penalised, accumulate_additive_penalties=penalise, accumulate_scaling_penalties=lambda: None)
    info.penalizer_orchestrator, info.left_by_a_plugin = orchestrator, "not a field"
    return info


@pytest.mark.parametrize("penalised", [False, True])
def test_the_forwards_sampling_info_is_sglangs_copy(penalised):
    ours, sglangs = isolation._for_forward(_info(penalised)), _info(penalised).copy_for_forward()
    assert vars(ours).keys() == vars(sglangs).keys()
    for name, value in vars(sglangs).items():
        found = vars(ours)[name]
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name
    assert type(ours) is SamplingBatchInfo and ours.penalizer_orchestrator is None


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_a_forward_leaves_no_field_changed(ours, overlap, monkeypatch):
    monkeypatch.setattr(isolation, "is_isd", lambda: ours)
    names = [field.name for field in dataclasses.fields(ScheduleBatch)]
    batch, before = object.__new__(ScheduleBatch), {name: object() for name in names}
    before |= {"spec_algorithm": SimpleNamespace(is_none=lambda: False), "sampling_info": _info(False)}
    vars(batch).update(before, left_by_a_plugin="popped")
    recorded = []
    scheduler = SimpleNamespace(record_batch_in_overlap=lambda seen: recorded.append(seen.sampling_info))
    original = Scheduler._forward_isolation
    with pytest.raises(ZeroDivisionError) if overlap else nullcontext():
        with isolation.isolated_at_once(original, scheduler, batch, overlap=overlap):
            assert batch.sampling_info is not before["sampling_info"]
            assert recorded == ([batch.sampling_info] if overlap else [])
            for name in names:
                setattr(batch, name, None)
            del batch.left_by_a_plugin
            batch.left_by_the_forward = "stays"
            if overlap:
                1 / 0
    assert vars(batch) == {**before, "left_by_the_forward": "stays"}
