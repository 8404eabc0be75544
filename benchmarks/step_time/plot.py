"""One picture: a step by part for every arm and batch, and the ceiling against concurrency."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.step_time.parts import ATTENTION, GEMM, HOST, LM_HEAD, MODEL, PARTS, SETUP, TITLE, VERIFY
from benchmarks.step_time.report import AR, ceilings, model, points

# Colours that stay apart for colour-blind readers (Okabe and Ito), the host gap in grey.
_COLOURS = {ATTENTION: "#0072B2", GEMM: "#E69F00", LM_HEAD: "#F0E442", MODEL: "#56B4E9", VERIFY: "#D55E00", SETUP: "#CC79A7", HOST: "#999999"}
_LINES = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"


def draw(found: dict, path: Path) -> None:
    """A row per context: a panel of stacked bars per batch, its own scale each, and the ceiling on the right."""
    measured = points(found["rows"])
    tops = ceilings(measured, found["tpf"])
    contexts = sorted({p.context for p in measured})
    batches = sorted({p.batch for p in measured})
    every = sorted({stride for at in tops.values() for stride in at})
    widths = [1.0] * len(batches) + [max(1.8, 0.5 * len(batches))]
    figure, axes = plt.subplots(
        len(contexts), len(widths), figsize=(2.5 * sum(widths) + 0.6, 3.6 * len(contexts) + 1.1), squeeze=False, gridspec_kw={"width_ratios": widths}, layout="constrained"
    )
    last = found["runs"][-1]
    figure.suptitle(f"One decode step by part, and the speed-up it allows: {model(last)}, {last['device']}", fontsize=12)
    for row, context in zip(axes, contexts):
        for axis, batch in zip(row, batches):
            _bars(axis, [p for p in measured if (p.context, p.batch) == (context, batch)], f"batch {batch}, context {context}")
        row[0].set_ylabel("ms a step")
        _lines(row[-1], {batch: tops.get((context, batch), {}) for batch in batches}, found["tpf"], context, every)
    handles = [plt.Rectangle((0, 0), 1, 1, color=_COLOURS[part]) for part in PARTS]
    figure.legend(handles, [TITLE[part] for part in PARTS], loc="outside lower center", ncols=len(PARTS), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis, chosen, title: str) -> None:
    axis.set_title(title, fontsize=10)
    if not chosen:
        axis.text(0.5, 0.5, "not measured", ha="center", va="center", color="#666666", transform=axis.transAxes)
        axis.set_axis_off()
        return
    names = [p.arm if p.arm == AR else str(p.stride) for p in chosen]
    bottom = [0.0] * len(chosen)
    for part in PARTS:
        heights = [p.parts[part] for p in chosen]
        axis.bar(names, heights, bottom=bottom, color=_COLOURS[part], width=0.75)
        bottom = [low + height for low, height in zip(bottom, heights)]
    axis.set_xlabel("AR, and ISD stride N")
    axis.spines[["top", "right"]].set_visible(False)


def _lines(axis, by_batch: dict[int, dict[int, float]], tpf: dict[int, dict], context: int, every: list[int]) -> None:
    """``every``: all strides of the picture; one looks the same in each panel."""
    axis.set_title(f"ceiling over AR, context {context}", fontsize=10)
    batches = [batch for batch in by_batch if by_batch[batch]]
    strides = sorted({stride for batch in batches for stride in by_batch[batch]})
    for stride in strides:
        i = every.index(stride)
        x = [batch for batch in batches if stride in by_batch[batch]]
        style = {"color": _LINES[i % len(_LINES)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 5}
        axis.plot(x, [by_batch[batch][stride] for batch in x], label=f"N = {stride} (TPF {tpf[stride]['tpf']:.2f})", **style)
    axis.axhline(1, color="black", linewidth=1, linestyle="--")
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("C, running requests")
    axis.set_ylabel("TPF x T_AR / T_ISD")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if strides:
        axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
