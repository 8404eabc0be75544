"""The plots of a comparison, as PNG."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, NullLocator

from idlm_sglang.bench.one_batch import BatchCell
from idlm_sglang.bench.summary import Cell

_DPI = 130
_SHOWN = 3  # concurrencies in the latency plot: lowest, middle, highest


def draw(cells: Sequence[Cell], directory: Path, title: str, batches: Sequence[BatchCell] = ()) -> list[str]:
    """Write the plots; their file names. Those without data (no second arm, no drafts, no static batches) are left out."""
    colours = {arm: f"C{i % 10}" for i, arm in enumerate(dict.fromkeys(c.arm for c in cells))}
    made = []
    drawn = (("throughput.png", _throughput, cells), ("speedup.png", _speedup, cells), ("latency.png", _latency, cells), ("acceptance.png", _acceptance, cells), ("one_batch.png", _one_batch, batches))
    for name, draw_one, some in drawn:
        figure = draw_one(some, colours)
        if figure is None:
            continue
        figure.suptitle(title, fontsize=10)
        figure.savefig(directory / name, dpi=_DPI)
        plt.close(figure)
        made.append(name)
    return made


def _temperatures(cells: Sequence[Cell | BatchCell]) -> list[float]:
    return list(dict.fromkeys(c.temperature for c in cells))


def _panels(columns: int, rows: int = 1, height: float = 3.9):
    return plt.subplots(rows, columns, figsize=(max(4.8 * columns, 5.5), height * rows), squeeze=False, layout="constrained")


def _concurrency_axis(axes, cells: Sequence[Cell | BatchCell]) -> None:
    found = sorted({c.concurrency for c in cells})
    axes.set_xscale("log", base=2)
    axes.set_xticks(found, [str(c) for c in found])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("concurrent requests")
    axes.grid(alpha=0.3)


def _throughput(cells: Sequence[Cell | BatchCell], colours: dict[str, str], of: str = "output tokens per second, all requests"):
    temperatures = _temperatures(cells)
    figure, grid = _panels(len(temperatures))
    for axes, temperature in zip(grid[0], temperatures):
        some = [c for c in cells if c.temperature == temperature]
        for arm, colour in colours.items():
            mine = [c for c in some if c.arm == arm]
            axes.plot([c.concurrency for c in mine], [c.throughput for c in mine], "o-", color=colour, label=arm, markersize=4)
        _concurrency_axis(axes, some)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(of)
        axes.set_title(f"T = {temperature:g}", fontsize=10)
        axes.legend()
    return figure


def _one_batch(batches: Sequence[BatchCell], colours: dict[str, str]):
    return _throughput(batches, colours, "one batch: decode tokens per second") if batches else None


def _speedup(cells: Sequence[Cell], colours: dict[str, str]):
    compared = [c for c in cells if c.ratio]
    if not compared:
        return None
    temperatures = _temperatures(compared)
    figure, grid = _panels(len(temperatures))
    reference = next(c.arm for c in cells if c.ratio is None)
    for axes, temperature in zip(grid[0], temperatures):
        some = [c for c in compared if c.temperature == temperature]
        for arm, colour in colours.items():
            mine = [c for c in some if c.arm == arm]
            if not mine:
                continue
            mean = np.array([c.ratio.mean for c in mine])
            known = all(c.ratio.low is not None for c in mine)
            spread = np.array([[c.ratio.mean - c.ratio.low for c in mine], [c.ratio.high - c.ratio.mean for c in mine]]) if known else None
            axes.errorbar([c.concurrency for c in mine], mean, yerr=spread, fmt="o-", color=colour, capsize=3, label=arm, markersize=4)
        axes.axhline(1, color="grey", linewidth=1)
        _concurrency_axis(axes, some)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"throughput over {reference}, 95 % interval")
        axes.set_title(f"T = {temperature:g}", fontsize=10)
        axes.legend()
    return figure


def _latency(cells: Sequence[Cell], colours: dict[str, str]):
    temperatures = _temperatures(cells)
    all_ = sorted({c.concurrency for c in cells})
    shown = sorted({all_[0], all_[len(all_) // 2], all_[-1]})[:_SHOWN]
    figure, grid = _panels(len(shown), len(temperatures), 3.2)
    for row, temperature in zip(grid, temperatures):
        for axes, concurrency in zip(row, shown):
            for c in (c for c in cells if (c.temperature, c.concurrency) == (temperature, concurrency)):
                share = np.arange(1, len(c.requests) + 1) / len(c.requests)
                axes.step(c.requests, share, where="post", color=colours[c.arm], label=c.arm)
            axes.set_xlim(left=0)
            axes.set_ylim(0, 1)
            axes.grid(alpha=0.3)
            axes.set_xlabel("seconds to the end of the answer")
            axes.set_ylabel("share of answers")
            axes.set_title(f"T = {temperature:g}, {concurrency} concurrent", fontsize=10)
            axes.legend(fontsize=8)
    return figure


def _acceptance(cells: Sequence[Cell], colours: dict[str, str]):
    some = [c for c in cells if c.decoding and any(c.decoding["proposed"])]
    if not some:
        return None
    temperatures = _temperatures(some)
    figure, grid = _panels(len(temperatures))
    for axes, temperature in zip(grid[0], temperatures):
        for arm in dict.fromkeys(c.arm for c in some):
            mine = [c.decoding for c in some if (c.arm, c.temperature) == (arm, temperature)]
            # The load changes who waits, not what a draft is worth: all concurrencies together.
            accepted, proposed = ([sum(column) for column in zip_longest(*(d[key] for d in mine), fillvalue=0)] for key in ("accepted", "proposed"))
            rates = [a / p for a, p in zip(accepted, proposed) if p]
            axes.plot(range(1, len(rates) + 1), rates, "o-", color=colours[arm], label=arm, markersize=4)
        longest = max(len(c.decoding["proposed"]) for c in some)
        axes.set_xticks(range(1, longest + 1))
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.set_xlabel("position behind the pending token")
        axes.set_ylabel("drafts accepted / verified")
        axes.set_title(f"T = {temperature:g}", fontsize=10)
        axes.legend()
    return figure
