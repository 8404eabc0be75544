"""The simulator: limits that are known exactly, closed forms that the request-level loop reproduces, and an error estimate that leaves out what it says."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.simulate import __main__ as command
from benchmarks.simulate import fit, options, predict, published, report, roofline, validate
from benchmarks.simulate.bench_results import Bench, Single, single
from benchmarks.simulate.chain import Acceptance
from benchmarks.simulate.controlled import Controlled
from benchmarks.simulate.devices import BF16, DEVICES, DTYPES
from benchmarks.simulate.loop import Fixed, Load, run
from benchmarks.simulate.measured_times import MeasuredTimes
from benchmarks.simulate.models import MODELS
from benchmarks.simulate.results import Results
from benchmarks.simulate.roofline import AR, Overheads, Roofline, Setup
from benchmarks.simulate.workload import Workload
from benchmarks.step_time import ceiling, store
from benchmarks.step_time.parts import PARTS
from idlm_sglang.isd.stride import tokens_per_round

SLOTS, SEED = 64, 3
LOAD = Load.busy(Workload(prompt=50, answer=300, spread=0.5), np.array([SLOTS]), waves=6, seed=SEED)
OVERHEADS = Overheads(context=0.3, host=2e-3, isd=2e-3, isd_request=1e-4)


class Constant:
    """Every step takes ``seconds`` of its stride, whatever runs; a prefill is free."""

    def __init__(self, seconds):
        self.seconds = seconds

    def decode(self, stride, running, columns):
        return np.array([self.seconds(int(n)) for n in stride])

    def prefill(self, requests, tokens):
        return np.zeros(len(requests))


def _ratio(times, stride, acceptance, load=LOAD, **changes):
    ar = run(times, Fixed(AR), acceptance, load, SEED)
    got = run(times, Fixed(stride), acceptance, load, SEED, **changes)
    return got.steady[0] / ar.steady[0], got


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_a_free_step_gives_the_tokens_per_forward(stride):
    ratio, got = _ratio(Constant(lambda n: 0.01), stride, predict.COLD, warm=True)
    expected = ceiling.tokens_per_forward(stride, published.ACCEPTANCE)
    print(f"N = {stride}: ratio {ratio:.3f}, closed form {expected:.3f}")
    assert ratio == pytest.approx(expected, rel=0.03)
    # An answer's end cuts its last round: a round in a hundred here.
    assert got.per_round[0] == pytest.approx(expected, rel=0.03)


def test_no_acceptance_gives_ar_divided_by_the_step():
    ratio, got = _ratio(Constant(lambda n: 0.01 if n == AR else 0.013), 4, Acceptance((0.0,)))
    assert got.per_round[0] == 1.0
    assert ratio == pytest.approx(1 / 1.3, rel=1e-6)


@pytest.mark.parametrize("linear, branch", [((0.9,), None), ((0.95, 0.8, 0.7), None), ((0.9,), (0.59,)), ((0.8, 0.7), (0.6, 0.3))])
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_requests_one_by_one_reproduce_the_stationary_tokens_per_round(stride, linear, branch):
    endless = Load(np.full((1, 256), 4000), 10, np.array([256]), np.zeros((1, 256), np.int64))
    got = run(Constant(lambda n: 1.0), Fixed(stride), Acceptance(linear, branch), endless, SEED).per_round[0]
    expected = tokens_per_round(linear, branch, stride)
    print(f"N = {stride}, {linear}, {branch}: {got:.4f}, stationary {expected:.4f}")
    assert got == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_better_device_is_never_slower(dtype):
    base = DEVICES["H100"]
    stride, running = (x.ravel() for x in np.meshgrid([AR, 1, 2, 3, 4, 8], [1, 7, 64, 256]))
    for model in MODELS.values():
        for tp in (1, 4):

            def seconds(device):
                return Roofline([Setup(model, device, tp, dtype)], OVERHEADS).decode(stride, running, 1000 * running)

            before = seconds(base)
            for better in (replace(base, bandwidth=1.4 * base.bandwidth), replace(base, flops={d: 2 * f for d, f in base.flops.items()}), replace(base, link=2 * base.link)):
                assert (seconds(better) <= before).all()
            assert (seconds(replace(base, bandwidth=1.4 * base.bandwidth)) < before).any()


def test_dimensions_give_the_published_sizes():
    sizes = {name: (model.linear + 2 * model.lm_head) / 1e9 for name, model in MODELS.items()}
    assert sizes == pytest.approx({"8B": 8.19, "32B": 32.76}, rel=0.005)
    assert Setup(MODELS["32B"], DEVICES["H100"], 1, BF16).capacity(1000) < 64 < Setup(MODELS["32B"], DEVICES["H200"], 1, BF16).capacity(1000)


def test_published_points_are_one_table():
    points = published.load()
    by = {(p.source, p.series, p.stride, p.clients, p.tp): p.tokens_per_second for p in points}
    assert len(by) == len(points) == 40
    assert by["logs", "AR", 1, 64, 1] == 5851 and by["tp4", "I-DLM", 3, 64, 4] == 7963
    covered = published.covered(points)
    ratios = [p.tokens_per_second / published.reference(p, points).tokens_per_second for p in covered if p.series != published.AR]
    assert len(ratios) == 16 and min(ratios) == pytest.approx(0.64, abs=0.005)


def test_the_fit_finds_the_overheads_that_made_the_points():
    points = [replace(p, tokens_per_second=fit.throughput(p, OVERHEADS)) for p in published.covered(published.load())]
    found = fit.fit(points)
    assert [found.context, found.host, found.isd, found.isd_request] == pytest.approx([0.3, 2e-3, 2e-3, 1e-4], rel=0.01)


def test_leaving_out_leaves_out():
    points = published.covered(published.load())
    wild = next(i for i, p in enumerate(points) if p.series == published.ISD and p.clients == 16)
    planted = [*points[:wild], replace(points[wild], tokens_per_second=3 * points[wild].tokens_per_second), *points[wild + 1 :]]
    before, after = ({(x.point.source, x.point.series, x.point.stride, x.point.setting): x for x in fit.leave_one_out(ps)} for ps in (points, planted))
    key = ("logs", published.ISD, 4, (1, 16))
    print(f"error of the wild point {after[key].error:+.0%}, before {before[key].error:+.0%}")
    assert abs(after[key].error) > 0.5 > 3 * abs(before[key].error)
    for k, x in before.items():
        # The wild point moves every fit but the one it is left out of, with its neighbours at the same setting.
        assert (x.predicted == after[k].predicted) == (k[3] == (1, 16))
    (ar, ratio), (ar_then, ratio_then) = fit.errors(list(before.values())), fit.errors(list(after.values()))
    assert ratio_then.mean > ratio.mean and ratio_then.worst.point.clients == 16


def test_the_loop_agrees_with_the_throughput_that_is_fitted():
    points = published.covered(published.load())
    overheads = fit.fit(points)
    load = Load.busy(Workload.of_context(1e3 * overheads.context), np.array([SLOTS]), waves=2, seed=SEED)
    times = Roofline([Setup(MODELS["8B"], DEVICES["H100"], 1, BF16)], overheads)
    for series, stride in ((published.AR, AR), (published.ISD, 4)):
        point = next(p for p in points if (p.source, p.series, p.clients) == ("logs", series, SLOTS))
        looped = run(times, Fixed(stride), predict.COLD, load, SEED).steady[0]
        direct = fit.throughput(replace(point, tokens_per_forward=tokens_per_round(predict.COLD.linear, None, max(stride, 1))), overheads)
        print(f"{series}: loop {looped:.0f}, fitted formula {direct:.0f} tokens per second")
        assert looped == pytest.approx(direct, rel=0.04)


def test_the_controller_finds_the_best_stride_where_one_is_far_ahead():
    for cost, best in ((lambda n: 0.01, 8), (lambda n: 0.01 * max(1, n) ** 2, 1)):
        times = Constant(cost)
        policy = Controlled([times], np.array([SLOTS]), salvage=False)
        ar, got = run(times, Fixed(AR), predict.COLD, LOAD, SEED), run(times, policy, predict.COLD, LOAD, SEED)
        print(f"best {best}: ratio {got.steady[0] / ar.steady[0]:.3f}, rounds by stride {({n: round(float(u[0]), 3) for n, u in got.used.items()})}")
        assert got.used[best][0] > 0.8
        assert got.steady[0] > 0.95 * run(times, Fixed(best), predict.COLD, LOAD, SEED).steady[0]


def test_stride_1_costs_what_was_measured():
    bench = Bench.read(options.parse([]).bench)
    cost = single(bench)
    ar = 1 / np.exp(np.mean(np.log(bench.throughputs("stock", 1))))
    assert cost.seconds > 0 and (1 - cost.share) * (ar + cost.seconds) == pytest.approx(ar)
    setups = predict.setups()
    fit_free, ones = OVERHEADS, np.ones(len(setups), int)
    for scenario, extra in ((predict.BASE, cost.seconds), (predict.SCENARIOS[2], 0.0)):
        times = scenario.times(setups, fit_free, cost)
        assert times.decode(ones, ones, 0 * ones) - times.decode(AR * ones, ones, 0 * ones) == pytest.approx(extra * ones)
    times = predict.SCENARIOS[1].times(setups, fit_free, cost)
    assert times.decode(AR * ones, ones, 0 * ones) / times.decode(ones, ones, 0 * ones) == pytest.approx((1 - cost.share) * ones)


def test_measured_times_are_linear_between_what_was_measured_and_a_stride_has_its_own_contexts(tmp_path):
    """AR and N = 4 at contexts 100 and 1,100, N = 2 at 100 alone."""

    def row(arm, batch, context, wall):
        told = {"run": "r", "arm": arm, "batch": batch, "context": context, "repeat": 0, "steps": 10, "width": 1.0, "mean_context": float(context), "elsewhere": 0.0}
        return told | {"wall_ms": wall, **{f"{part}_ms": wall / len(PARTS) for part in PARTS}}

    rows = [row(arm, b, c, ms * b + c / 100) for arm, ms, contexts in (("AR", 1.0, (100, 1100)), ("N=2", 2.0, (100,)), ("N=4", 4.0, (100, 1100))) for b in (1, 5) for c in contexts]
    store.add(tmp_path, {"id": "r", "command": "c", "options": {}, "device": "d", "processor": "p", "versions": {}, "commit": None}, rows, {})
    times = MeasuredTimes(tmp_path, (0.0, 0.0))

    def ms(stride, batch, context):
        return 1e3 * times.decode(np.array([stride]), np.array([batch]), np.array([batch * context]))[0]

    assert ms(4, 3, 600) == pytest.approx(12 + 6) and ms(AR, 3, 600) == pytest.approx(3 + 6)
    assert ms(4, 9, 100) == pytest.approx(36 + 1) and ms(4, 1, 5000) == ms(4, 1, 1100)
    assert ms(2, 5, 100) == ms(2, 5, 1100) == pytest.approx(11)
    assert ms(3, 5, 100) == pytest.approx((11 + 21) / 2)


def test_results_survive_the_disk_and_become_a_page_and_plots(tmp_path):
    from benchmarks.simulate import plot

    points = published.covered(published.load())
    checked = [validate.Checked("isd:4", c, 1.5, 1.4, low, high, 3.0, 3.1) for c, low, high in ((1, 1.2, 1.6), (2, None, None))]
    predicted = predict.predict(replace(OVERHEADS, context=0.115), Single(0.1, 1e-4, "given"), [2], waves=1, say=lambda word: None)
    Results(OVERHEADS, Single(0.1, 1e-4, "given"), "typed", "bench", "step times", fit.leave_one_out(points), checked, predicted).write(tmp_path)
    found = Results.read(tmp_path)
    assert len(found.predicted) == len(predicted) and found.checked == checked
    assert [x.point for x in found.left_out] == [x.point for x in fit.leave_one_out(points)]
    page = report.page(found)
    assert "| isd:4 | 1 | 1.50 | 1.40 (1.20 to 1.60) | +7% | yes |" in page and "a model, not a measurement" in page.lower()
    plot.draw(found, tmp_path)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("published.png", "speedup.png", "checked.png"))


def test_the_committed_page_says_what_the_committed_figures_say():
    folder = options.RESULTS / "simulate"
    assert (folder / "table.md").read_text() == report.page(Results.read(folder))


@pytest.mark.parametrize(
    "words, named",
    [
        (["--clients", "0"], "--clients 0 is out of range; allowed: an integer from 1 to 4096"),
        (["--clients", "many"], "--clients: invalid int value: 'many'"),
        (["--single-ms", "-1"], "--single-ms -1 is out of range"),
        (["--single-share", "1"], "--single-share 1 is out of range; allowed: a share from 0 to below 1"),
        (["--waves", "0"], "--waves 0 is out of range"),
        (["--bench", "/nowhere"], "--bench /nowhere holds no results of `idlm bench`"),
        (["--step-time", "/nowhere"], "--step-time /nowhere holds no raw.csv"),
        (["--render", "--out", "/nowhere"], "--out /nowhere holds no inputs.json"),
    ],
)
def test_a_mistake_ends_in_one_line(words, named, capsys):
    try:
        assert command.main(words) == 1
    except SystemExit as ended:
        assert ended.code == 2
    said = capsys.readouterr().err
    assert named in said and said.startswith("simulate: ") and said.count("\n") == 1
