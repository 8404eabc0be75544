"""The runner: a correctness gate in front of every timing, medians with quartiles, CSV and Markdown."""

import argparse
import csv
import importlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.benchmark import Timer

from benchmarks.kernels.fingerprint import fingerprint

OPS = ("attention", "target", "noise", "choose", "verify", "propose", "step", "sampler", "penalties", "grammar", "state", "page_table")
RESULTS = Path(__file__).parents[1] / "results" / "kernels"
# Rows x vocabulary of one call, above which a case is not run on a CPU: one call would take seconds.
CPU_CELLS = 5_000_000
# Calls slower than this are timed in three rounds, references of that kind in one.
SLOW_SECONDS = 0.5

OURS, REFERENCE, KERNEL, LIBRARY, FLOOR = "ours", "reference", "kernel", "library", "floor"


class WrongOp(SystemExit):
    """Our op does not compute what its reference computes: no figure of it may be printed."""


@dataclass
class Arm:
    """One way to compute an op.

    Attributes:
        name: as printed.
        kind: ours, reference, kernel (a Triton kernel of ours: it may not be wrong, either), library, or floor (a part that every arm
            contains; neither checked nor compared).
        run: the call that is timed. Its result is what ``check`` sees.
        check: ``(result, reference's result)``; raises AssertionError where they differ. Without one the arm must equal the
            reference bit for bit. A library that draws from a generator of its own is checked for what must hold of any draw.
        needs_gpu: attempted on a GPU only.
        note: what a reader must know to compare.
        absent: why the arm cannot run at this size; empty where it can.
        timed: False for a reference that is there to check against only.
    """

    name: str
    kind: str
    run: Callable[[], object]
    check: Callable[[object, object], None] | None = None
    needs_gpu: bool = False
    note: str = ""
    absent: str = ""
    timed: bool = True


@dataclass
class Case:
    """One op at one size.

    Attributes:
        variant, dims: what is computed; the columns that name the size.
        build: the arms. Called only where the case is run: the inputs of the largest sizes do not fit a small machine.
        cells: rows x vocabulary of one call.
    """

    variant: str
    dims: dict[str, object]
    build: Callable[[], list[Arm]]
    cells: int = 0


@dataclass
class Options:
    """How to run: ``seconds`` is the least time per arm and round."""

    device: str = "cpu"
    quick: bool = False
    threads: int = 1
    cells: int | None = None
    seconds: float = 0.04
    rounds: int = 5

    @property
    def clock(self) -> Callable[[], float] | None:
        """CPU time of the one thread: a busy neighbour does not count. None: torch's clock, which waits for a GPU."""
        return time.thread_time if self.device == "cpu" and self.threads == 1 else None


@dataclass
class Row:
    """Microseconds of one arm at one size, or why there are none."""

    op: str
    case: Case
    arm: Arm
    times: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def quartiles(self) -> tuple[float, float, float] | None:
        """(25 %, median, 75 %) in microseconds."""
        return tuple(float(q) for q in np.percentile(np.array(self.times) * 1e6, [25, 50, 75])) if self.times else None


def assert_equal(got, want) -> None:
    """Bit for bit, tensors and tuples of tensors."""
    if isinstance(want, (tuple, list)):
        assert len(got) == len(want), f"{len(got)} results, {len(want)} expected"
        for g, w in zip(got, want):
            assert_equal(g, w)
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, check_dtype=False)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def admitted(arm: Arm, expected, options: Options) -> tuple[str, float]:
    """(why the arm is not timed, or empty; seconds of one call). The first call is also the warm-up.

    Raises:
        WrongOp: ours differs from the reference.
    """
    if arm.absent:
        return f"not run: {arm.absent}", 0.0
    if arm.needs_gpu and options.device == "cpu":
        return "not run: no GPU", 0.0
    try:
        began = time.perf_counter()
        result = arm.run()
        seconds = time.perf_counter() - began
        if arm.kind in (OURS, KERNEL, LIBRARY):
            (arm.check or assert_equal)(result, expected)
        return "", seconds
    except AssertionError as error:
        if arm.kind == LIBRARY:
            return f"not run: differs from the reference ({one_line(error)})", 0.0
        raise WrongOp(f"{arm.name} is wrong, nothing was timed: {one_line(error)}") from error
    except Exception as error:
        # A library may lack this device, this dtype or a compiler. Ours and the reference may not.
        if arm.kind != LIBRARY:
            raise
        return f"not run: {one_line(error)}", 0.0


def measure(op: str, case: Case, options: Options) -> list[Row]:
    """Check every arm against the reference, then time them in turn, so that a slow spell meets all of them."""
    limit = CPU_CELLS if options.cells is None else options.cells
    if options.device == "cpu" and case.cells > limit:
        return [Row(op, case, Arm("ours", OURS, lambda: None), note=f"not run: {case.cells} cells, limit {limit} on a CPU (--cells)")]
    arms = case.build()
    rows = [Row(op, case, arm, note=arm.note) for arm in arms]
    expected = next(arm for arm in arms if arm.kind == REFERENCE).run()
    live: list[tuple[Row, Timer, int]] = []
    for row in rows:
        if not row.arm.timed:
            row.note = "not timed"
            continue
        try:
            reason, seconds = admitted(row.arm, expected, options)
        except WrongOp as error:
            raise WrongOp(f"{op}, {case.variant}, {spell(case.dims)}: {error}") from error
        row.note = reason or row.note
        if not reason:
            timer = Timer("run()", globals={"run": row.arm.run}, num_threads=options.threads, **clock_of(options))
            rounds = options.rounds if seconds < SLOW_SECONDS else 1 if row.arm.kind == REFERENCE else min(options.rounds, 3)
            live.append((row, timer, rounds))
    for round_ in range(options.rounds):
        for row, timer, rounds in live:
            if round_ < rounds:
                row.times += timer.blocked_autorange(min_run_time=options.seconds).times
    return rows


def clock_of(options: Options) -> dict:
    return {} if options.clock is None else {"timer": options.clock}


def spell(dims: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in dims.items())


def unfinished(kept: Path) -> Path:
    """Where the cases of a run stand that was ended before its last."""
    return kept.with_suffix(".part.csv")


def run_op(op: str, options: Options, kept: Path | None = None) -> Iterator[list[Row]]:
    """The rows of every case of an op, as they are measured. A wrong op leaves no figures of its other cases behind."""
    module = importlib.import_module(f"benchmarks.kernels.{op}")
    torch.manual_seed(0)
    for case in module.cases(options):
        try:
            yield measure(op, case, options)
        except WrongOp:
            if kept:
                unfinished(kept).unlink(missing_ok=True)
            raise


def ours_of(rows: list[Row]) -> Row:
    return next(row for row in rows if row.arm.kind == OURS)


def write_csv(path: Path, measured: list[list[Row]], lines: dict[str, str]) -> None:
    """The fingerprint as `#` lines, then one line per arm; `to_ours` is its median over ours (above 1: ours is faster)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dims = list(measured[0][0].case.dims)
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in lines.items())
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["op", "variant", *dims, "arm", "kind", "median_us", "q1_us", "q3_us", "samples", "to_ours", "note"])
        for rows in measured:
            ours = ours_of(rows).quartiles
            for row in rows:
                found = row.quartiles
                figures = [f"{found[1]:.2f}", f"{found[0]:.2f}", f"{found[2]:.2f}", len(row.times)] if found else ["", "", "", 0]
                ratio = f"{found[1] / ours[1]:.3f}" if found and ours else ""
                size = [row.case.dims[name] for name in dims]
                out.writerow([row.op, row.case.variant, *size, row.arm.name, row.arm.kind, *figures, ratio, row.note])


def print_markdown(op: str, measured: list[list[Row]]) -> None:
    """One table per op: median microseconds of ours, the other arms as multiples of it."""
    names = list(dict.fromkeys(row.arm.name for rows in measured for row in rows if row.arm.kind != OURS and row.arm.timed))
    dims = list(measured[0][0].case.dims)
    head = ["variant", *dims, "ours, µs", *names]
    print(f"\n### {op}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for rows in measured:
        ours = ours_of(rows).quartiles
        cells = [rows[0].case.variant, *(str(rows[0].case.dims[name]) for name in dims)]
        cells.append(f"{ours[1]:.0f} ({ours[0]:.0f} to {ours[2]:.0f})" if ours else ours_of(rows).note)
        by_name = {row.arm.name: row for row in rows}
        for name in names:
            row = by_name.get(name)
            found = row.quartiles if row else None
            cells.append(f"{found[1] / ours[1]:.2f}x" if found and ours else row.note if row else "")
        print(f"| {' | '.join(cells)} |")


def faster_alternatives(measured: list[list[Row]]) -> list[str]:
    """Alternatives whose upper quartile lies below our lower one: one line per variant and arm, with the range over the sizes."""
    tried: dict[tuple, int] = {}
    faster: dict[tuple, list[tuple[float, Row, Row]]] = {}
    for rows in measured:
        ours = ours_of(rows)
        for row in rows:
            if not (ours.times and row.times and row.arm.kind in (LIBRARY, REFERENCE)):
                continue
            key = (row.op, row.case.variant, row.arm.name)
            tried[key] = tried.get(key, 0) + 1
            if row.quartiles[2] < ours.quartiles[0]:
                faster.setdefault(key, []).append((ours.quartiles[1] / row.quartiles[1], row, ours))
    lines = []
    for (op, variant, arm), found in faster.items():
        found.sort(key=lambda entry: entry[0])
        (least, *_), (most, row, ours) = found[0], found[-1]
        note = f" ({row.note})" if row.note else ""
        lines.append(
            f"- {op}, {variant}: {arm}{note} is faster at {len(found)} of {tried[op, variant, arm]} sizes, {least:.2f} to {most:.2f} times; "
            f"most at {spell(row.case.dims)}: {row.quartiles[1]:.0f} µs, ours {ours.quartiles[1]:.0f} µs"
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description="Every op of a decode step beside its alternatives.")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of: {', '.join(OPS)} (all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few small sizes; leaves the CSV alone unless --out is given")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; on one, CPU time is measured (default 1)")
    parser.add_argument("--seconds", type=float, help="least time per arm and round (default 0.04, quick 0.005)")
    parser.add_argument("--cells", type=int, help=f"largest rows x vocabulary of one call on a CPU (default {CPU_CELLS})")
    parser.add_argument("--out", type=Path, help="folder of the CSVs (default benchmarks/results/kernels)")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.ops) - set(OPS))
    if unknown:
        parser.error(f"no op {unknown[0]!r}; allowed: {', '.join(OPS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU; allowed: cpu")
    if args.seconds is not None and not 0 <= args.seconds <= 60:
        parser.error(f"--seconds {args.seconds}; allowed: 0 to 60")
    if args.threads < 1:
        parser.error(f"--threads {args.threads}; allowed: an integer >= 1")
    pace = dict(seconds=0.005, rounds=3) if args.quick else {}
    if args.seconds is not None:
        pace["seconds"] = args.seconds
    options = Options(args.device, args.quick, args.threads, args.cells, **pace)
    torch.set_num_threads(args.threads)
    words = sys.argv[1:] if argv is None else argv
    lines = fingerprint(args.device, args.threads, shlex.join(["python", "-m", "benchmarks.kernels", *words]))
    print("\n".join(f"{name}: {value}" for name, value in lines.items()))
    faster: list[str] = []
    for op in args.ops or OPS:
        measured = []
        kept = (args.out or RESULTS) / f"{op}.{args.device}.csv" if args.out or not args.quick else None
        for rows in run_op(op, options, kept):
            measured.append(rows)
            if kept:
                write_csv(unfinished(kept), measured, lines)
            if sys.stderr.isatty():
                print(f"{op}: {len(measured)} cases", end="\r", file=sys.stderr, flush=True)
        if not measured:
            print(f"\n### {op}\n\nnot run: nothing of ours to measure on {args.device}")
            continue
        print_markdown(op, measured)
        faster += faster_alternatives(measured)
        if kept:
            unfinished(kept).replace(kept)
    print("\n### Where an alternative is faster, beyond both spreads\n")
    print("\n".join(faster) or "nowhere")
