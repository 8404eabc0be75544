"""Rows to points, and points to a Markdown table."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.step_time import ceiling
from benchmarks.step_time.parts import MEANING, PARTS, TITLE

AR = "AR"


@dataclass(frozen=True)
class Point:
    """One arm at one batch and context, all its runs together.

    Attributes:
        wall: milliseconds a step, mean over all steps; low, high: of the runs' means.
        elsewhere: share of the machine that other programs took meanwhile.
        parts: milliseconds, adding up to ``wall``.
    """

    arm: str
    batch: int
    context: int
    steps: int
    width: float
    wall: float
    low: float
    high: float
    elsewhere: float
    parts: dict[str, float]

    @property
    def stride(self) -> int:
        """N; 0 for AR."""
        return 0 if self.arm == AR else int(self.arm.removeprefix("N="))


def model(run: dict) -> str:
    """What a run measured, in words."""
    options = run["options"]
    dims = ", ".join(f"{name} {value}" for name, value in options.get("dims", {}).items())
    greedy = options.get("sampling", {"temperature": 0}) == {"temperature": 0}
    clock = ", processor time of one thread" if options.get("clock") == "cpu" else ""
    return options["model"] + clock + (f" with {dims}" if dims else "") + ("" if greedy else f", {options['sampling']}")


def points(rows: Sequence[dict]) -> list[Point]:
    """One point per arm, batch and context, in the rows' order."""
    grouped: dict[tuple, list[dict]] = {}
    for row in rows:
        grouped.setdefault((row["arm"], row["batch"], row["context"]), []).append(row)
    found = []
    for (arm, batch, context), runs in grouped.items():
        steps = sum(run["steps"] for run in runs)

        def mean(name: str) -> float:
            return sum(run[name] * run["steps"] for run in runs) / steps

        walls = [run["wall_ms"] for run in runs]
        parts = {part: mean(f"{part}_ms") for part in PARTS}
        found.append(Point(arm, batch, context, steps, mean("width"), mean("wall_ms"), min(walls), max(walls), mean("elsewhere"), parts))
    return found


def ceilings(found: Sequence[Point], tpf: dict[int, dict]) -> dict[tuple[int, int], dict[int, float]]:
    """By (context, batch): stride to the speed-up over AR that its step time allows."""
    ar = {(p.context, p.batch): p.wall for p in found if p.arm == AR}
    result: dict[tuple[int, int], dict[int, float]] = {}
    for p in found:
        if p.arm != AR and p.stride in tpf and (p.context, p.batch) in ar:
            result.setdefault((p.context, p.batch), {})[p.stride] = ceiling.speed_up(tpf[p.stride]["tpf"], ar[p.context, p.batch], p.wall)
    return result


def table(found: dict) -> str:
    """The whole table.md."""
    measured, tpf = points(found["rows"]), found["tpf"]
    tops = ceilings(measured, tpf)
    last = found["runs"][-1]
    lines = [f"# Step time: {model(last)}, {last['device']}", ""]
    for context in sorted({p.context for p in measured}):
        lines += [f"## Context {context}", "", *_parts(measured, context, tops), ""]
    lines += ["## Ceiling: TPF(N) x T_AR(C) / T_ISD(N, C)", "", *_ceiling(tops, tpf), ""]
    lines += ["## Parts", "", *(f"- **{TITLE[part]}**: {MEANING[part]}" for part in PARTS), ""]
    return "\n".join([*lines, "## Runs", "", *_runs(found["runs"])]) + "\n"


def _parts(measured: Sequence[Point], context: int, tops: dict) -> list[str]:
    head = ["batch", "arm", "rows per request", "ms a step (runs from, to)", "busy elsewhere", *(f"{TITLE[part]} ms" for part in PARTS), "of AR's step", "ceiling"]
    lines = [_row(head), _row(["---:"] + ["---"] + ["---:"] * (len(head) - 2))]
    chosen = [p for p in measured if p.context == context]
    ar = {p.batch: p.wall for p in chosen if p.arm == AR}
    for p in chosen:
        share = [f"{p.parts[part]:.2f} ({p.parts[part] / p.wall:.0%})" for part in PARTS]
        top = tops.get((context, p.batch), {}).get(p.stride)
        against = [f"{p.wall / ar[p.batch]:.2f}" if p.batch in ar else "", "" if top is None else f"{top:.2f}"]
        lines.append(_row([p.batch, p.arm, f"{p.width:g}", f"{p.wall:.2f} ({p.low:.2f}, {p.high:.2f})", f"{p.elsewhere:.0%}", *share, *against]))
    return lines


def _ceiling(tops: dict, tpf: dict[int, dict]) -> list[str]:
    strides = sorted({stride for by_stride in tops.values() for stride in by_stride})
    lines = [_row(["context", "C", *(f"N={stride}" for stride in strides), "best"]), _row(["---:"] * (len(strides) + 2) + ["---"])]
    for (context, batch), by_stride in sorted(tops.items()):
        best, value = ceiling.best_stride(by_stride)
        shown = [f"{by_stride[stride]:.2f}" if stride in by_stride else "" for stride in strides]
        lines.append(_row([context, batch, *shown, f"N = {best} ({value:.2f})" if best else "AR"]))
    lines.append("")
    for stride in strides:
        p = f"; a constant acceptance of {ceiling.acceptance_of(stride, tpf[stride]['tpf']):.3f} gives the same" if stride > 1 else ""
        lines.append(f"- N = {stride}: {tpf[stride]['tpf']:.2f} tokens per forward ({tpf[stride]['source']}{p})")
    return lines


def _runs(runs: Sequence[dict]) -> list[str]:
    lines = []
    for run in runs:
        versions = ", ".join(f"{name} {value}" for name, value in run["versions"].items() if value)
        lines.append(f"- `{run['command']}`: {run['device']} ({run['processor']}), {run['options']['method']}, {versions}, commit {run['commit']}")
    return lines


def _row(cells: Sequence) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
