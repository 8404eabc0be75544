"""The controller's engine side: what a step is timed by, and the KV columns that the stride in use needs."""

import random
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch

from idlm_sglang.compat import reserve as compat_reserve
from idlm_sglang.config import Settings
from idlm_sglang.engine.calibrate import batch_sizes, more_runs
from idlm_sglang.engine.clock import StepClock
from idlm_sglang.engine.controller import StrideControl
from idlm_sglang.engine.metrics import IsdMetrics, Totals
from idlm_sglang.engine.requests import SINGLE, STRIDED, RequestPlan, stride_limit
from idlm_sglang.engine.spec_io import IsdResult
from idlm_sglang.engine.worker import IsdWorker
from idlm_sglang.isd.stride import StepTimes, tokens_per_round


class Time:
    """A clock that stands still until told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(clock, time, *steps, inside=3.0, around=1.0):
    """What each (batch, stride) step's start says of the one before; None stands for an extend of 50 s."""
    found = []
    for step in steps:
        if step is None:
            clock.other()
            time.now += 50
            continue
        found.append(clock.start(*step))
        time.now += inside
        clock.end()
        time.now += around
    return found


def test_a_blocking_step_is_timed_from_its_start_to_the_next():
    time = Time()
    assert run(StepClock(True, time), time, (4, 2), (4, 2), (3, 6), (3, 1)) == [None, (4, 2, 4.0), (4, 2, 4.0), (3, 6, 4.0)]


def test_a_blocking_step_behind_which_an_extend_came_is_timed_without_it():
    time = Time()
    clock = StepClock(True, time)
    assert run(clock, time, (4, 2), None, (4, 2)) == [None, None]
    assert run(clock, time, (4, 2), None, (5, 2), None, (5, 3)) == [(4, 2, 4.0), (4, 2, 4.0), (5, 2, 4.0)]


def test_an_overlapped_step_is_timed_only_among_its_like():
    time = Time()
    clock = StepClock(False, time)
    assert run(clock, time, (4, 2), (4, 2), (4, 2)) == [None, None, (4, 2, 4.0)]
    assert run(clock, time, (4, 6), (4, 6), (4, 6)) == [(4, 2, 4.0), None, (4, 6, 4.0)]
    assert run(clock, time, (8, 6), (8, 6)) == [(4, 6, 4.0), None]
    assert run(clock, time, None, (8, 6), (8, 6), (8, 6)) == [None, None, (8, 6, 4.0)]


def a_request(mode=STRIDED, stride=None):
    return SimpleNamespace(idlm_plan=RequestPlan(1, mode, "default", stride, 0, True))


@pytest.mark.parametrize("overlap", [False, True])
def test_kv_is_reserved_for_the_stride_in_use(overlap):
    worker = IsdWorker.__new__(IsdWorker)
    worker.settings, worker.server_seed, worker.stride = Settings(stride=1, max_stride=8, auto=False), 0, 1
    worker._in_flight = 1
    # As in AR: the token that this step writes, and the one of a step whose result is not known yet.
    assert worker.columns_ahead([a_request(), a_request(SINGLE)], overlap) == 1 + overlap
    worker.stride = 4
    assert worker.columns_ahead([a_request(), a_request(SINGLE)], overlap) == 7 + overlap
    assert worker.columns_ahead([a_request(SINGLE)], overlap) == 1 + overlap
    assert worker.columns_ahead([a_request(), a_request(stride=8)], overlap) == 15 + overlap
    # Behind a wider step, which may commit as many tokens as its stride.
    worker.stride, worker._in_flight = 1, 8
    assert worker.columns_ahead([a_request()], overlap) == 1 + 8 * overlap
    # Never more than SGLang reserves for the largest stride.
    worker.stride = 8
    assert worker.columns_ahead([a_request()], overlap) <= 2 * worker.settings.max_width


def test_a_stride_of_its_own_is_reserved_for_beside_stride_1():
    worker = IsdWorker.__new__(IsdWorker)
    worker.settings, worker.server_seed, worker.stride, worker._in_flight = Settings(stride=1, max_stride=8, auto=False), 0, 1, 1
    assert worker.columns_ahead([a_request(), a_request(stride=4)], False) == 7
    assert worker.columns_ahead([a_request(SINGLE, stride=4)], False) == 1


def test_the_need_of_the_next_step_is_sglangs_sum(monkeypatch):
    """Pages of one token are summed without SGLang's rounding."""
    original = vars(ScheduleBatch)["_new_tokens_required_next_decode_spec_v2"]
    original = getattr(original, "__wrapped__", original)
    rng = random.Random(1)
    for ahead in (1, 7, 15):
        kv = [SimpleNamespace(kv_committed_len=rng.randrange(50), kv_allocated_len=rng.randrange(70)) for _ in range(9)]
        requests = [SimpleNamespace(kv=part) for part in kv]
        monkeypatch.setattr(compat_reserve, "is_isd", lambda: True)
        monkeypatch.setattr(compat_reserve, "columns", lambda reqs, overlap: ahead)
        monkeypatch.setattr("sglang.srt.managers.schedule_batch.get_alloc_reserve_per_decode", lambda: ahead)
        batch = SimpleNamespace(enable_overlap=False)
        assert compat_reserve.need_in_use(original, batch, requests, 1) == original(batch, requests, 1)


def test_a_chosen_stride_fits_a_batch_that_grew_since_and_a_forced_one_is_kept():
    worker = IsdWorker.__new__(IsdWorker)
    worker.stride, worker._most_rows = 8, 3000
    worker.auto = True
    chosen = {requests: worker.stride_for(requests) for requests in (1, 200, 201, 1000, 4000)}
    assert chosen == {1: 8, 200: 8, 201: 7, 1000: 2, 4000: 1}
    assert all((2 * n - 1) * requests <= 3000 for requests, n in chosen.items() if n > 1)
    # What a request asks for itself is bounded likewise: it makes the whole step as wide.
    asks, settings = a_request(stride=8).idlm_plan, Settings(stride=4, max_stride=8)
    assert [stride_limit(asks, settings, 1, worker._most_for(n)) for n in (200, 1000, 4000)] == [7, 1, 0]
    worker.auto = False
    assert worker.stride_for(4000) == 8 and stride_limit(asks, settings, 1, worker._most_for(4000)) == 7


def test_step_times_are_measured_from_one_request_to_as_many_as_run():
    assert more_runs(5.0, 0.002, 6) == 3 and more_runs(5.0, 0.4, 6) == 2 and more_runs(4.0, 1.0, 6) == 0 and more_runs(-2.0, 0.1, 1) == 0
    assert batch_sizes(64) == [1, 4, 16, 64] and batch_sizes(24) == [1, 4, 16, 24] and batch_sizes(1) == [1]


def control():
    times = StepTimes({(b, n): 1 + 0.1 * n for b in (1, 16) for n in (1, 2, 4, 8)})
    made = StrideControl(times, (1, 2, 4, 8), True, SimpleNamespace(world_size=1), Totals.none(7), False)
    told = []
    made._controller._yields.observe = lambda *window: told.append(window)
    return made, told


@pytest.mark.parametrize("late", [0, 1, 2])
def test_what_rounds_committed_is_told_with_their_own_stride(late):
    """Results reach the host some steps late; the first step of a stride brings the drafts of another."""
    made, told = control()
    strides = [4] * 8 + [8] * 4 + [1] * 4 + [4] * 8
    due = []
    for stride in strides:
        due.append((stride, 10 * stride, 2))
        if len(due) > late:
            made.rounds([], due.pop(0))
        made.decide(2)
    seen = {}
    for stride, rounds, over_expected in told:
        assert over_expected == pytest.approx(5 * stride / tokens_per_round([0.8], None, stride)), "tokens of one stride only"
        seen[stride] = seen.get(stride, 0) + rounds
    # Of each run of steps all but the first, as far as they have arrived.
    assert seen == {4: 2 * (7 + 7 - late), 8: 2 * 3, 1: 2 * 3}


def test_a_window_without_rounds_of_the_servers_stride_says_nothing():
    made, told = control()
    for _ in range(8):
        made.rounds([(3, 1, False)], None)
        made.decide(2)
    assert not told


def test_only_requests_at_the_servers_stride_say_what_its_rounds_commit():
    """Beside them a request with a stride of its own, one that takes one token per step, and one that had ended."""
    metrics, heard = IsdMetrics(7, None, {}, None), []
    metrics.on_step = lambda *step: heard.append(step)

    def request(mode, stride, ended=False, grammar=None):
        plan = RequestPlan(0, mode, "default", stride, 0, True)
        return SimpleNamespace(output_ids=[0], idlm_plan=plan, finished=lambda: ended, is_retracted=False, finished_len=None, grammar=grammar)

    reqs = [request(STRIDED, None), request(STRIDED, 8), request(SINGLE, None), request(STRIDED, None), request(STRIDED, None, True)]
    stats = torch.tensor([[3, 2, 0, 3], [7, 6, 0, 7], [0, 0, 0, 0], [3, 0, 0, 0], [3, 3, 0, 3]], dtype=torch.float32)
    result = IsdResult(round_stats=stats, limits=[3, 7, 0, 3, 3], speculative_num_draft_tokens=8)
    metrics.begin(SimpleNamespace(reqs=reqs), result)
    for req, run in zip(reqs, (2, 6, 0, 0, 0)):
        req.output_ids += [1] * (run + 1)
    metrics.end()
    (seen, committed), = heard
    assert committed == (4, 4, 2) and len(seen) == 4
    assert all(not hasattr(req, "idlm_record") for req in reqs), "rows were not trimmed"
    result.doubted = [False, False, False, False, False]
    metrics.begin(SimpleNamespace(reqs=reqs), result)
    metrics.end()
    records = [getattr(req, "idlm_record", None) for req in reqs]
    assert [(r.tried, r.stood) for r in records[:3]] == [(3, 2), (7, 6), (0, 0)] and records[3:] == [None, None], "survivors say nothing of drafts"
    reqs[0].grammar, before = object(), records[0].tried
    single = IsdResult(speculative_num_draft_tokens=1)
    for step in (result, single):
        metrics.begin(SimpleNamespace(reqs=reqs), step)
        metrics.end()
    assert records[0].tried == before, "what a grammar forces stands"
    assert heard[-1][1][0] == 1 and heard[-1][1][2] == 2, "steps at stride 1 are told, too: drafts end there"
