"""The command: fit, check, predict, then write the results and say what the model may be used for."""

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.simulate import fit, options, predict, published, report, validate
from benchmarks.simulate.bench_results import Bench, Single, single
from benchmarks.simulate.options import Options
from benchmarks.simulate.results import Results
from idlm_sglang.config import SettingError


def main(argv: list[str]) -> int:
    try:
        asked = options.parse(argv)
        if not asked.render:
            _simulate(asked, "python -m benchmarks.simulate" + "".join(" " + shlex.quote(word) for word in argv)).write(asked.out)
        found = Results.read(asked.out)
    except SettingError as refused:
        print(str(refused.code).replace("idlm: ", "simulate: ", 1), file=sys.stderr)
        return 1
    from benchmarks.simulate import plot

    (asked.out / "table.md").write_text(report.page(found))
    plot.draw(found, asked.out)
    for sentence in (*report.verdict(found), *(f"check on CPU, {s}" for s in report.check_errors(found.checked))):
        print(sentence)
    print(f"written to {asked.out}")
    return 0


def _simulate(asked: Options, command: str) -> Results:
    bench = Bench.read(asked.bench)
    points = published.covered(published.load())
    overheads = fit.fit(points)
    checked = validate.check(asked.step_time, bench, asked.seed)
    cost = _single(asked, bench)
    predicted = predict.predict(overheads, cost, asked.clients, asked.seed, asked.waves, asked.warm, say=lambda word: print(word, file=sys.stderr, flush=True))
    return Results(overheads, cost, command, " ".join(map(_shown, asked.bench)), _shown(asked.step_time), fit.leave_one_out(points), checked, predicted)


def _single(asked: Options, bench: Bench) -> Single:
    """The cost of stride 1: measured, each half replaced by what was typed."""
    typed = {"seconds": None if asked.single_ms is None else asked.single_ms / 1e3, "share": asked.single_share}
    typed = {name: value for name, value in typed.items() if value is not None}
    cost = Single(0.0, 0.0, "") if len(typed) == 2 else single(bench)
    return replace(cost, **typed, source=" and ".join(filter(None, [cost.source, f"{', '.join(typed)} as typed"]))) if typed else cost


def _shown(path: Path) -> str:
    """Inside the repository without its place on this machine."""
    root = options.RESULTS.parent.parent
    return os.path.relpath(path, root) if path.resolve().is_relative_to(root) else str(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
