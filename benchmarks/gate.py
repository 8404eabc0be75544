"""Step time with the gated adapter over without it: same base model, batch, stride and context.

    python -m benchmarks.gate [--batch 1 8 32] [--stride 4] [--context 128] [--tokens 64] [--repeats 5] [--model BASE --adapter ADAPTER]

Two `idlm serve --stride N`, one with the adapter, take turns on the same full batches; only steady decode steps count
(`benchmarks.step_time`). Both run 2N - 1 rows per request. The published figure for an 8B model of rank 128 is 1.12.
A base that names no MASK needs IDLM_MASK_TOKEN_ID in the environment. On a machine with neighbours: OMP_NUM_THREADS=1 and
`--clock cpu`, processor time of the one thread that does it all.
"""

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.step_time import arms, options
from benchmarks.step_time.records import steady, window
from idlm_sglang.demo import RISD_ADAPTER_DIR, RISD_BASE_DIR


def measured(arm: arms.Arm, asked: options.Options, batch: int, context: int) -> float:
    """Milliseconds a step of one run."""
    half = asked.tokens / 2
    steps, _ = arm.decode(arms.prompts(asked, batch, context), 2 * asked.tokens + 2)
    return window(steady(steps, batch, context - half, context + half)).wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a request that the measured steps span: fewer for a slow model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=(options.WALL, options.CPU), default=options.WALL)
    parser.add_argument("--model", type=Path, default=RISD_BASE_DIR)
    parser.add_argument("--adapter", type=Path, default=RISD_ADAPTER_DIR)
    args = parser.parse_args()
    words = ["--model", str(args.model), "--strides", str(args.stride), "--context", str(args.context), "--tokens", str(args.tokens)]
    words += ["--clock", args.clock, "--method", options.TIMERS]
    without = options.parse([*words, "--batch", *map(str, args.batch), "--", "--dtype", "float32" if args.model == RISD_BASE_DIR else "auto"])
    with_it = replace(without, server_flags=(*without.server_flags, "--idlm-lora", str(args.adapter)))
    with tempfile.TemporaryDirectory(prefix="gate-") as folder, ExitStack() as stack:
        served = [(o, stack.enter_context(arms.arm(arms.ISD, o, Path(folder) / name))) for name, o in (("off", without), ("on", with_it))]
        print(f"{'batch':>5} {'off ms':>8} {'on ms':>8} {'on / off':>9}  (ratios of the runs, lowest and highest)")
        for batch in args.batch:
            runs = [tuple(measured(arm, o, batch, args.context) for o, arm in served) for _ in range(args.repeats)]
            off, on = (statistics.median(column) for column in zip(*runs))
            ratios = [b / a for a, b in runs]
            print(f"{batch:>5} {off:>8.2f} {on:>8.2f} {statistics.median(ratios):>9.3f}  ({min(ratios):.3f}, {max(ratios):.3f})", flush=True)


if __name__ == "__main__":
    main()
