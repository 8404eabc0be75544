"""A forward under ISD leaves a batch as it was, as SGLang's own isolation does."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler

from idlm_sglang.compat import isolation


class _Info:
    def copy_for_forward(self):
        return _Info()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_a_forward_leaves_no_field_changed(ours, overlap, monkeypatch):
    monkeypatch.setattr(isolation, "is_isd", lambda: ours)
    names = [field.name for field in dataclasses.fields(ScheduleBatch)]
    batch, before = object.__new__(ScheduleBatch), {name: object() for name in names}
    before |= {"spec_algorithm": SimpleNamespace(is_none=lambda: False), "sampling_info": _Info()}
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
            if overlap:
                1 / 0
    assert vars(batch) == before
