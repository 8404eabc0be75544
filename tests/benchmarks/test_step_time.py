"""A step's parts add up to its wall time, each is charged to what did it, and the ceiling follows from the step times."""

import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.step_time import __main__ as command
from benchmarks.step_time import ceiling, plot, ranges, report, store, trace
from benchmarks.step_time.parts import ATTENTION, GEMM, HOST, LM_HEAD, MODEL, PARTS, PREFIX, SETUP, VERIFY
from benchmarks.step_time.records import Records, Step, parse, steady, window

BATCH = 4
SECONDS = {MODEL: 0.001, ATTENTION: 0.004, GEMM: 0.008, VERIFY: 0.002}  # slept in each part of a step


class Forwards:
    """Stands where the scheduler's model is: the real wrappers around it, sleeps for the work."""

    reqs = range(BATCH)
    seq_lens_cpu = torch.full((BATCH,), 100)

    class forward_mode:
        is_extend = staticmethod(lambda: False)

    def run_batch(self, batch):
        self.sample()

    def forward(self):
        time.sleep(SECONDS[MODEL])
        self.attend()
        torch.ones(8, 8) @ torch.ones(8, 8)
        self.multiply()

    def attend(self):
        time.sleep(SECONDS[ATTENTION])

    def multiply(self):
        time.sleep(SECONDS[GEMM])

    def sample(self):
        self.forward()
        time.sleep(SECONDS[VERIFY])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six steps under torch.profiler: (records' path, trace events)."""
    folder = tmp_path_factory.mktemp("step_time")
    engine = type("Engine", (Forwards,), {})
    recorder = ranges.Recorder(str(folder / "records.csv"))
    for name, part in (("attend", ATTENTION), ("multiply", GEMM), ("forward", MODEL), ("sample", VERIFY)):
        ranges._wrap(engine, name, recorder, part)
    ranges._wrap_steps(engine, recorder)
    scheduler = engine()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(6):
            scheduler.run_batch(scheduler)
            recorder.see(scheduler)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    return folder / "records.csv", trace.load(folder / "trace.json")


def test_recorded_parts_add_up_to_the_distance_between_steps(run):
    steps = Records(run[0]).new()
    assert len(steps) == 5  # the sixth has no end
    for step, after in zip(steps, steps[1:]):
        assert step.wall == after.begin - step.begin
    mean = window(steady(steps, BATCH, 0, 200))
    assert sum(mean.parts.values()) == pytest.approx(mean.wall)
    assert mean.context == 100
    print({part: round(ms, 2) for part, ms in mean.parts.items()})
    for part, seconds in SECONDS.items():
        assert mean.parts[part] >= 1e3 * seconds
    assert mean.parts[LM_HEAD] == mean.parts[SETUP] == 0


def test_a_trace_of_torch_profiler_gives_every_part_its_own_time(run):
    split = trace.attribute(run[1], BATCH)
    print({part: round(ms, 2) for part, ms in split.parts.items()})
    assert not split.on_device and split.steps == 5
    assert sum(split.parts.values()) == pytest.approx(split.wall)
    for part, seconds in SECONDS.items():
        assert split.parts[part] >= 0.999e3 * seconds
    assert sum(trace.on_wall(split, 7.0).values()) == pytest.approx(7.0)
    with pytest.raises(ValueError, match="no two decode steps of 5"):
        trace.attribute(run[1], BATCH + 1)


def _event(cat, name, ts, dur, correlation=None):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {} if correlation is None else {"correlation": correlation}}


def test_kernels_count_for_the_part_that_launched_them_and_once_where_they_overlap():
    """Events in the profiler's format, written by hand: no GPU is at hand here."""
    events = [_event("user_annotation", f"{PREFIX}step decode {BATCH}", ts, 90) for ts in (0, 100, 200)]
    for begin in (0, 100):
        events += [
            _event("user_annotation", PREFIX + SETUP, begin + 1, 80),
            _event("user_annotation", PREFIX + MODEL, begin + 5, 40),
            _event("user_annotation", PREFIX + ATTENTION, begin + 10, 10),
            _event("cuda_runtime", "cudaLaunchKernel", begin + 12, 1, begin + 1),
            _event("kernel", "any_name", begin + 30, 20, begin + 1),  # attention, running long after its launch
            _event("cuda_runtime", "cudaLaunchKernel", begin + 25, 1, begin + 2),
            _event("kernel", "norm", begin + 40, 20, begin + 2),  # half of it beside the one before
            _event("cuda_driver", "cuGraphLaunch_v2", begin + 50, 1, begin + 3),
            *(_event("kernel", name, begin + ts, 5, begin + 3) for name, ts in (("nvjet_tst", 60), ("_fwd_grouped_kernel_stage1", 65), ("rms_norm", 70), ("gemm_last", 75))),
        ]
    split = trace.attribute(events, BATCH)
    assert split.on_device and split.steps == 2
    microseconds = {part: ms * 1e3 for part, ms in split.parts.items()}
    assert microseconds == pytest.approx({ATTENTION: 25, GEMM: 5, LM_HEAD: 5, MODEL: 15, VERIFY: 0, SETUP: 0, HOST: 0})
    on_wall = trace.on_wall(split, 0.08)
    assert on_wall[HOST] * 1e3 == pytest.approx(30)
    assert sum(on_wall.values()) == pytest.approx(0.08)


def test_only_decode_steps_of_the_full_batch_at_the_context_count():
    def step(begin, decode=True, requests=2, columns=200):
        return Step(begin, decode, requests, requests, columns, (10, 0, 0, 0, 0, 0, 0))

    kept = step(20)
    steps = [step(0, decode=False), step(10, columns=20), kept, step(30, requests=1), step(40), step(55), step(65, decode=False)]
    assert steady(steps, 2, 50, 150) == []  # kept is followed by a smaller batch, 40 by a wait, 55 by a prefill
    steps[3] = step(30)
    assert steady(steps, 2, 50, 150) == [kept, steps[3]]
    assert parse("5,1,2,14,200," + ",".join("1234567")).wall == 28


def test_published_tokens_per_forward_follow_from_the_published_acceptance():
    assert ceiling.tokens_per_forward(4, 0.90) == pytest.approx(2.93, abs=0.02)
    for stride, published in ceiling.PUBLISHED_TPF.items():
        value = ceiling.tokens_per_forward(stride, ceiling.PUBLISHED_ACCEPTANCE)
        print(f"N = {stride}: {value:.2f}, published {published}")
        assert value == pytest.approx(published, rel=0.03)
        assert ceiling.acceptance_of(stride, value) == pytest.approx(ceiling.PUBLISHED_ACCEPTANCE)
        assert ceiling.tokens_per_forward(stride, 1.0) == stride and ceiling.tokens_per_forward(stride, 0.0) == 1
    assert ceiling.speed_up(2.96, 10.0, 14.8) == pytest.approx(2.0)
    assert ceiling.best_stride({2: 1.2, 4: 1.5}) == (4, 1.5)
    assert ceiling.best_stride({2: 0.7, 4: 0.9}) == (0, 1.0)


def _row(run, arm, batch, wall, repeat=0):
    return {"run": run, "arm": arm, "batch": batch, "context": 128, "repeat": repeat, "steps": 10, "width": 1.0, "mean_context": 128.0, "elsewhere": 0.0,
            "wall_ms": wall, **{f"{part}_ms": wall / len(PARTS) for part in PARTS}}  # fmt: skip


def test_results_add_up_over_runs_and_name_the_best_stride(tmp_path):
    def run(name):
        return {"id": name, "command": "c", "options": {"model": "demo", "method": "timers"}, "device": "d", "processor": "p", "versions": {}, "commit": None}

    given = {2: {"tpf": 1.8, "source": "given"}, 4: {"tpf": 3.0, "source": "given"}}
    store.add(tmp_path, run("first"), [_row("first", "AR", 1, 50.0), _row("first", "AR", 8, 10.0)], given)
    rows = [_row("second", "AR", 1, 9.0), _row("second", "AR", 1, 11.0, 1), _row("second", "N=2", 1, 12.0), _row("second", "N=4", 1, 15.0)]
    store.add(tmp_path, run("second"), rows, {})
    found = store.read(tmp_path)
    assert [p.wall for p in report.points(found["rows"])] == [10.0, 12.0, 15.0, 10.0]
    assert report.ceilings(report.points(found["rows"]), found["tpf"])[128, 1] == pytest.approx({2: 1.5, 4: 2.0})
    assert "| 128 | 1 | 1.50 | 2.00 | N = 4 |" in report.table(found)
    ar, two, _, _ = report.points(found["rows"])
    assert report.ceiling_range(ar, two, 1.8) == pytest.approx((1.35, 1.65))
    plot.draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_every_function_that_is_measured_exists():
    for owner, name, _ in ranges.functions():
        assert callable(getattr(owner, name)), f"{owner.__name__}.{name}"
    scheduler, runner, target, isd = ranges.engine()
    assert callable(scheduler.run_batch) and callable(runner.forward)
    assert callable(target.forward_batch_generation) and callable(isd.forward_batch_generation)


@pytest.mark.parametrize(
    "words, named",
    [
        (["--strides", "17"], "--strides 17 is out of range; allowed: an integer from 1 to 16"),
        (["--batch", "0"], "--batch 0 is out of range"),
        (["--batch", "many"], "--batch: invalid int value: 'many'"),
        (["--context", "4096"], "--context 4096 does not fit --tokens 64 and the model's 4096 positions; allowed: 40 to"),
        (["--acceptance", "1.5"], "--acceptance 1.5 is out of range"),
        (["--tpf", "4=five"], "--tpf 4=five is not valid; allowed: N=VALUE"),
        (["--tpf", "4=5"], "--tpf 4=5.0 is out of range; allowed: 1 to 4"),
        (["--dims", "num_hidden_layers=2", "--model", "demo"], "--dims has no meaning with --model demo"),
        (["--model", "/nowhere"], "--model /nowhere holds no config.json"),
        (["--sampling", "hot"], "hot is no JSON object"),
        (["--render", "--out", "/nowhere"], "--out /nowhere holds no raw.csv"),
    ],
)
def test_a_mistake_ends_in_one_line(words, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step_time", *words])
    try:
        assert command.main() == 1
    except SystemExit as ended:
        assert ended.code == 2
    said = capsys.readouterr().err
    assert named in said and said.startswith("step_time: ") and said.count("\n") == 1
    assert not Path("/nowhere").exists()
