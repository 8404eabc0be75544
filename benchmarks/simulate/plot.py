"""Three pictures: the published points beside the model, the speed-up over concurrency of every set-up, and the check on this machine."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter, NullLocator

from benchmarks.simulate import fit, published
from benchmarks.simulate.predict import CONTROLLER, FIXED, Predicted, pick
from benchmarks.simulate.published import AR, ISD, LORA, Measured, reference
from benchmarks.simulate.results import Results

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_COLOURS = {"N=2": "#56B4E9", "N=3": "#009E73", "N=4": "#E69F00", "N=8": "#CC79A7", CONTROLLER: "#000000"}
# By series and stride.
_SERIES = {(AR, 1): ("#000000", "s"), (ISD, 4): ("#D55E00", "o"), (ISD, 3): ("#009E73", "D"), (LORA, 4): ("#0072B2", "^"),
           ("EAGLE-3", None): ("#999999", "v"), ("DFlash d4", None): ("#777777", "s"), ("DFlash d16", None): ("#bbbbbb", "P")}  # fmt: skip
_NOTE = "a model, not a measurement"


def draw(found: Results, folder: Path) -> None:
    points = published.load()
    for name, figure in (("published.png", _published(found, points)), ("speedup.png", _speedup(found, points)), ("checked.png", _checked(found))):
        figure.savefig(folder / name, dpi=100)
        plt.close(figure)


def _concurrency(axis, values: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(values), [str(c) for c in values])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _published(found: Results, points: list[Measured]):
    """Tokens per second and ratio to AR, TP1: lines are the fitted model, marks what was published."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    figure.suptitle(f"8B bf16 on one H100: published (marks), and the model fitted on all but the grey ones (lines): {_NOTE}")
    clients = np.unique(np.rint(np.geomspace(1, 64, 40)).astype(int))

    def curve(series: str, stride: int, tpf: float) -> np.ndarray:
        return np.array([fit.throughput(Measured("", series, stride, int(c), 1, 0, tpf, ""), found.overheads) for c in clients])

    ar = curve(AR, 1, 1.0)
    for series, stride, tpf in ((AR, 1, 1.0), (ISD, 4, 2.96), (ISD, 3, 2.48), (LORA, 4, 2.96)):
        values, style = curve(series, stride, tpf), {"color": _SERIES[series, stride][0], "label": f"model: {_name(series, stride)}"}
        left.plot(clients, values / 1e3, **style)
        if series != AR:
            right.plot(clients, values / ar, **style)
    for series, source, stride in dict.fromkeys((p.series, p.source, p.stride) for p in points if p.tp == 1):
        mine = [p for p in points if (p.series, p.source, p.stride, p.tp) == (series, source, stride, 1)]
        covered = series in published.COVERED
        style = {"color": _SERIES[series, stride][0], "marker": _SERIES[series, stride][1], "linestyle": "" if covered else ":", "markersize": 7}
        style |= {"fillstyle": "none" if source == "readme" else "full", "label": f"{_name(series, stride)} ({source if covered else 'not covered'})"}
        left.plot([p.clients for p in mine], [p.tokens_per_second / 1e3 for p in mine], **style)
        if series != AR:
            right.plot([p.clients for p in mine], [p.tokens_per_second / reference(p, points).tokens_per_second for p in mine], **style)
    for axis in (left, right):
        _concurrency(axis, [1, 8, 16, 32, 64])
        axis.set_xlabel("C, concurrent requests")
        axis.set_ylim(bottom=0)
    left.set_ylabel("thousand tokens per second, all requests")
    right.set_ylabel("over AR of the same source")
    right.axhline(1, color="black", linewidth=1)
    figure.legend(*left.get_legend_handles_labels(), fontsize=9, frameon=False, loc="outside right center")
    return figure


def _name(series: str, stride: int | None) -> str:
    return f"{series} N={stride}" if series in (ISD, LORA) else series


def _speedup(found: Results, points: list[Measured]):
    """A panel per set-up: rows model and dtype, columns device and TP."""
    setups = list(dict.fromkeys(r.setup for r in found.predicted))
    columns = len({tuple(s.split()[2:]) for s in setups})
    figure, grid = plt.subplots(len(setups) // columns, columns, figsize=(4.3 * columns, 3.3 * len(setups) / columns + 1), sharex=True, sharey=True, layout="constrained")
    figure.suptitle(f"Throughput over AR, simulated with the published server's host cost and N = 1 costing {1e3 * found.single.seconds:.2f} ms: {_NOTE}", fontsize=12)
    for axis, setup in zip(grid.flat, setups):
        mine = [r for r in found.predicted if r.setup == setup]
        _panel(axis, setup, mine, [p for p in points if p.series == ISD and setup == f"8B bf16 H100 TP{p.tp}"], points)
    for axis in grid[-1]:
        axis.set_xlabel("C, concurrent requests")
    for axis in grid[:, 0]:
        axis.set_ylabel("tokens per second over AR's")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _panel(axis, setup: str, rows: list[Predicted], measured: list[Measured], points: list[Measured]) -> None:
    def line(arm: str, salvage: int, label: str, **style) -> None:
        mine = pick(rows, arm, salvage=salvage)
        axis.plot([r.clients for r in mine], [r.steady_ratio for r in mine], color=_COLOURS[arm], label=label, **style)

    for n in FIXED:
        line(f"N={n}", 0, f"N = {n} fixed", linewidth=1.3)
    line(CONTROLLER, 0, "controller", linewidth=2.6)
    line(CONTROLLER, 1, "controller, salvage", linewidth=1.5, linestyle="--")
    for p in measured:
        ratio = p.tokens_per_second / reference(p, points).tokens_per_second
        axis.plot(p.clients, ratio, "o" if p.stride == 4 else "D", color=_COLOURS[f"N={p.stride}"], markeredgecolor="black", markersize=6.5)
    # One entry in the common legend for each kind of mark, also from a panel that lacks it.
    for stride, mark in ((4, "o"), (3, "D")):
        axis.plot([], [], mark, color=_COLOURS[f"N={stride}"], markeredgecolor="black", label=f"published, N = {stride}")
    axis.axhline(1, color="black", linewidth=1)
    full = [r.clients for r in pick(rows, AR) if r.running < r.clients]
    if full:
        held = next(r.running for r in pick(rows, AR) if r.running < r.clients)
        axis.axvspan(min(full) / 2**0.5, 256 * 2**0.5, color="#dddddd", alpha=0.6)
        axis.text(256, 4.0, f"KV full:\n{held} run", fontsize=8, ha="right", va="top")
    worst = min(pick(rows, CONTROLLER), key=lambda r: r.steady_ratio)
    axis.set_title(f"{setup}   (controller's lowest: {worst.steady_ratio:.2f} at C = {worst.clients})", fontsize=9)
    _concurrency(axis, sorted({r.clients for r in rows}))
    axis.set_ylim(0, 4.2)


def _checked(found: Results):
    """Simulated ratios beside measured ones, on the machine where both ends are known."""
    arms = list(dict.fromkeys(x.arm for x in found.checked))
    figure, axis = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    axis.set_title("Embedded checkpoint on two CPU cores, T = 0: measured by idlm bench, simulated from measured step times", fontsize=10)
    for i, arm in enumerate(arms):
        mine = [x for x in found.checked if x.arm == arm]
        x, colour = np.array([r.concurrency for r in mine], float), ("#0072B2", "#D55E00", "#009E73", "#CC79A7")[i % 4]
        low, high = ([abs(getattr(r, end) - r.measured) if getattr(r, end) is not None else 0 for r in mine] for end in ("low", "high"))
        axis.errorbar(x, [r.measured for r in mine], yerr=[low, high], fmt="o", capsize=3, color=colour, label=f"{arm} measured, 95 % interval")
        axis.plot(x, [r.simulated for r in mine], "--x", color=colour, label=f"{arm} simulated")
    axis.axhline(1, color="black", linewidth=1)
    _concurrency(axis, sorted({r.concurrency for r in found.checked}))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("C, concurrent requests")
    axis.set_ylabel("throughput over stock SGLang")
    axis.legend(fontsize=9, frameon=False)
    return figure
