"""Rows to points, and points to a Markdown table."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.step_time import ceiling
from benchmarks.step_time.parts import MEANING, PARTS, TITLE

AR = "AR"


@dataclass(frozen=True)
class Point:
    """One arm at one batch and context.

    Attributes:
        steps: of all its runs.
        wall: milliseconds a step of the median run; parts: of that run, adding up to it. Of an even number of runs the two in the middle count.
        runs: milliseconds a step of each run.
        elsewhere: share of the machine that other programs took meanwhile.
    """

    arm: str
    batch: int
    context: int
    steps: int
    width: float
    wall: float
    parts: dict[str, float]
    runs: tuple[float, ...]
    elsewhere: float

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
        runs.sort(key=lambda run: run["wall_ms"])
        middle = runs[(len(runs) - 1) // 2 : len(runs) // 2 + 1]
        found.append(
            Point(
                arm=arm,
                batch=batch,
                context=context,
                steps=sum(run["steps"] for run in runs),
                width=_mean(runs, "width"),
                wall=_mean(middle, "wall_ms"),
                parts={part: _mean(middle, f"{part}_ms") for part in PARTS},
                runs=tuple(run["wall_ms"] for run in runs),
                elsewhere=_mean(runs, "elsewhere"),
            )
        )
    return found


def _mean(rows: Sequence[dict], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def ceilings(found: Sequence[Point], tpf: dict[int, dict]) -> dict[tuple[int, int], dict[int, float]]:
    """By (context, batch): stride to the speed-up over AR that its median step time allows."""
    ar = {(p.context, p.batch): p.wall for p in found if p.arm == AR}
    result: dict[tuple[int, int], dict[int, float]] = {}
    for p in found:
        if p.arm != AR and p.stride in tpf and (p.context, p.batch) in ar:
            result.setdefault((p.context, p.batch), {})[p.stride] = ceiling.speed_up(tpf[p.stride]["tpf"], ar[p.context, p.batch], p.wall)
    return result


def ceiling_range(ar: Point, isd: Point, tpf: float) -> tuple[float, float]:
    """The ceiling from AR's fastest run over ISD's slowest, and from AR's slowest over ISD's fastest."""
    return ceiling.speed_up(tpf, min(ar.runs), max(isd.runs)), ceiling.speed_up(tpf, max(ar.runs), min(isd.runs))


def table(found: dict) -> str:
    """The whole table.md."""
    measured, tpf = points(found["rows"]), found["tpf"]
    tops = ceilings(measured, tpf)
    last = found["runs"][-1]
    lines = [f"# Step time: {model(last)}, {last['device']}", ""]
    for context in sorted({p.context for p in measured}):
        lines += [f"## Context {context}", "", *_parts(measured, context, tops, tpf), ""]
    lines += ["## Ceiling: TPF(N) x T_AR(C) / T_ISD(N, C)", "", *_ceiling(measured, tops, tpf), ""]
    lines += ["## Parts", "", *(f"- **{TITLE[part]}**: {MEANING[part]}" for part in PARTS), ""]
    return "\n".join([*lines, "## Runs", "", *_runs(found["runs"])]) + "\n"


def _parts(measured: Sequence[Point], context: int, tops: dict, tpf: dict[int, dict]) -> list[str]:
    head = ["batch", "arm", "rows per request", "ms a step (runs from, to)", "busy elsewhere", *(f"{TITLE[part]} ms" for part in PARTS), "of AR's step", "ceiling (at least, at most)"]
    lines = [_row(head), _row(["---:"] + ["---"] + ["---:"] * (len(head) - 2))]
    chosen = [p for p in measured if p.context == context]
    ar = {p.batch: p for p in chosen if p.arm == AR}
    for p in chosen:
        share = [f"{p.parts[part]:.2f} ({p.parts[part] / p.wall:.0%})" for part in PARTS]
        top = tops.get((context, p.batch), {}).get(p.stride)
        against = [f"{p.wall / ar[p.batch].wall:.2f}" if p.batch in ar else "", ""]
        if top is not None:
            low, high = ceiling_range(ar[p.batch], p, tpf[p.stride]["tpf"])
            against[1] = f"{top:.2f} ({low:.2f}, {high:.2f})"
        lines.append(_row([p.batch, p.arm, f"{p.width:g}", f"{p.wall:.2f} ({min(p.runs):.2f}, {max(p.runs):.2f})", f"{p.elsewhere:.0%}", *share, *against]))
    return lines


def _ceiling(measured: Sequence[Point], tops: dict, tpf: dict[int, dict]) -> list[str]:
    found = {(p.context, p.batch, p.stride): p for p in measured}
    strides = sorted({stride for by_stride in tops.values() for stride in by_stride})
    lines = [_row(["context", "C", *(f"N={stride}" for stride in strides), "best (not told apart from)"]), _row(["---:"] * (len(strides) + 2) + ["---"])]
    for (context, batch), by_stride in sorted(tops.items()):
        best, value = ceiling.best_stride(by_stride)
        shown = [f"{by_stride[stride]:.2f}" if stride in by_stride else "" for stride in strides]
        ar = found[context, batch, 0]
        near = [s for s in by_stride if s != best and ceiling_range(ar, found[context, batch, s], tpf[s]["tpf"])[1] >= value]
        beside = f" ({', '.join(map(str, near))})" if near else ""
        lines.append(_row([context, batch, *shown, (f"N = {best}" if best else "AR") + beside]))
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
