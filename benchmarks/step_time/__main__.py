"""The command: measure what was asked for, then write the results and print the table."""

import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.step_time import arms, ceiling, store, trace
from benchmarks.step_time.options import CPU, DEMO, TRACE, Options, command_line, parse
from benchmarks.step_time.records import steady, window
from idlm_sglang.config import SettingError
from idlm_sglang.platform import accelerator_available

MOST_RUNS = 16
QUIET = 0.03
"""Share of the machine that other programs may take during a run before it is taken again."""


def main() -> int:
    # Ended from outside, the servers end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        options = parse(sys.argv[1:])
        if not options.render:
            measure(options)
        found = store.read(options.out)
    except SettingError as refused:
        print(str(refused.code).replace("idlm: ", "step_time: ", 1), file=sys.stderr)
        return 1
    from benchmarks.step_time import plot, report

    text = report.table(found)
    (options.out / "table.md").write_text(text)
    plot.draw(found, options.out / "plot.png")
    print(text)
    return 0


def measure(options: Options) -> None:
    """Start the arms, time every point, add the rows to raw.csv."""
    # On a CPU idle servers sleep, and arms that alternate see the same machine. A GPU's memory holds one at a time.
    groups = [[arms.AR], [arms.ISD]] if accelerator_available() else [[arms.AR, arms.ISD]]
    run = store.new_run(options, command_line())
    with tempfile.TemporaryDirectory(prefix="step_time-") as folder:
        for kinds in groups:
            with ExitStack() as stack:
                served = {kind: stack.enter_context(arms.arm(kind, options, Path(folder))) for kind in kinds}
                if arms.ISD in served:
                    store.add(options.out, run, [], _tokens_per_forward(options, served[arms.ISD]))
                for context in options.contexts:
                    for batch in options.batches:
                        store.add(options.out, run, _points(options, served, batch, context, run["id"]), {})


def _points(options: Options, served: dict[str, arms.Arm], batch: int, context: int, run: str) -> list[dict]:
    """Rows of every arm at one batch and context; the arms take turns. Runs beside which other programs were busy are
    taken again, and kept only where no others came."""
    chosen = [(kind, stride) for kind in served for stride in ((None,) if kind == arms.AR else options.strides)]
    prompts = arms.prompts(options, batch, context)
    half = options.tokens / 2
    runs: dict[tuple, list[dict]] = {c: [] for c in chosen}
    for repeat in range(MOST_RUNS):
        left = [c for c in chosen if not _enough(options, runs[c])]
        for kind, stride in left:
            arm = served[kind]
            arm.use(stride)
            # At one token a step all requests go together; at more the fast ones must not end before the window does.
            tokens = options.tokens if stride in (None, 1) else 2 * options.tokens
            steps, elsewhere = arm.decode(prompts, tokens + 2)
            steps = steady(steps, batch, context - half, context + half)
            if not steps:
                raise SystemExit(f"step_time: no steady step of {batch} requests at context {context} ({_name(stride)}); raise --tokens {options.tokens}")
            found = window(steps)
            runs[kind, stride].append({"run": run, "arm": _name(stride), "batch": batch, "context": context, "repeat": repeat, "steps": found.steps, "width": found.width,
                                       "mean_context": found.context, "elsewhere": elsewhere, "wall_ms": found.wall, **{f"{part}_ms": ms for part, ms in found.parts.items()}})  # fmt: skip
            _say(runs[kind, stride][-1])
        if not left:
            break
    rows = [row for c in chosen for row in (_quiet(runs[c]) if options.clock != CPU else None) or runs[c]]
    splits = {}
    if options.method == TRACE:
        for kind, stride in chosen:
            served[kind].use(stride)
            path = served[kind].profile(prompts, 2 * options.tokens, f"{kind}{stride or ''}-{batch}-{context}")
            splits[_name(stride)] = trace.attribute(trace.load(path), batch)
        for row in rows:
            row.update({f"{part}_ms": ms for part, ms in trace.on_wall(splits[row["arm"]], row["wall_ms"]).items()})
    return rows


def _quiet(runs: list[dict]) -> list[dict]:
    return [run for run in runs if run["elsewhere"] <= QUIET]


def _enough(options: Options, runs: list[dict]) -> bool:
    quiet = runs if options.clock == CPU else _quiet(runs)
    return len(quiet) >= options.repeats and sum(run["steps"] for run in quiet) >= options.steps


def _tokens_per_forward(options: Options, arm: arms.Arm) -> dict[int, dict]:
    """By stride: tokens per forward and where the figure is from."""
    found = {}
    if options.model == DEMO and options.tpf_prompts == 0 and options.acceptance is None:
        return {stride: {"tpf": value, "source": "given"} for stride, value in options.tpf.items()}
    texts = arms.tpf_prompts(options.tpf_prompts) if options.model == DEMO and options.acceptance is None else []
    for stride in options.strides:
        if stride == 1 or stride in options.tpf:
            found[stride] = {"tpf": options.tpf.get(stride, 1.0), "source": "given" if stride in options.tpf else "by definition"}
        elif options.acceptance is not None:
            found[stride] = {"tpf": ceiling.tokens_per_forward(stride, options.acceptance), "source": f"acceptance {options.acceptance:g}"}
        elif texts:
            arm.use(stride)
            tokens, rounds = arm.rounds(texts)
            found[stride] = {"tpf": tokens / rounds, "source": f"measured, {len(texts)} prompts, {rounds} forwards"}
        elif stride in ceiling.PUBLISHED_TPF:
            found[stride] = {"tpf": ceiling.PUBLISHED_TPF[stride], "source": "published, I-DLM-8B"}
        else:
            p = ceiling.PUBLISHED_ACCEPTANCE
            found[stride] = {"tpf": ceiling.tokens_per_forward(stride, p), "source": f"acceptance {p:g}, as published at N = 4"}
    return found


def _name(stride: int | None) -> str:
    return "AR" if stride is None else f"N={stride}"


def _say(row: dict) -> None:
    print(f"  {row['arm']:<5} batch {row['batch']:<4} context {row['context']:<6} {row['wall_ms']:8.2f} ms a step ({row['steps']} steps, {row['elsewhere']:.0%} busy elsewhere)", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
