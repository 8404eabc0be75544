"""Memory of a GPU: what the slots keep is held before the KV cache takes what is free."""

from types import SimpleNamespace

import pytest

from idlm_sglang.config import COUPLED, REJECTION, Settings
from idlm_sglang.engine import worker as workers
from idlm_sglang.engine.penalties import TokenCounts
from idlm_sglang.engine.state import SlotState


@pytest.mark.parametrize("rule", [COUPLED, REJECTION])
def test_what_the_slots_keep_is_held_to_the_byte(rule, monkeypatch):
    monkeypatch.setattr(workers, "get_schedule", lambda: SimpleNamespace(max_running_requests=64))
    worker = workers.IsdWorker.__new__(workers.IsdWorker)
    worker.device, worker.vocab, worker.settings = "meta", 151_936, Settings(max_stride=8, sampling_rule=rule)
    held = sum(tensor.nbytes for tensor in worker._hold())
    kept = SlotState(65, 7, worker.vocab, rule == REJECTION, "meta").q
    assert held == TokenCounts(65, worker.vocab, "meta").counts.nbytes + (0 if kept is None else kept.nbytes)
    worker.device = "cpu"
    assert worker._hold() == [], "which takes memory when it is written"
