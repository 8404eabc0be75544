"""The simulator against a machine where both its inputs and its answer were measured.

In: step times of `benchmarks.step_time`; of `idlm bench`, the answers' lengths, the acceptance by position and, from the reference arm alone, the
time to first token as prefill. Out: the ratio of each arm to the reference at every concurrency, beside the measured one.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.simulate.bench_results import Bench
from benchmarks.simulate.chain import Acceptance
from benchmarks.simulate.controlled import Controlled
from benchmarks.simulate.loop import Fixed, Load, run
from benchmarks.simulate.measured_times import MeasuredTimes
from benchmarks.simulate.roofline import AR
from idlm_sglang.isd.stride import ladder

STOCK = "stock"


@dataclass(frozen=True)
class Checked:
    """One arm at one concurrency: ratios to the reference, simulated and measured (with the measured interval), and tokens per request and decode step."""

    arm: str
    concurrency: int
    simulated: float
    measured: float
    low: float | None
    high: float | None
    simulated_per_round: float
    measured_per_round: float

    @property
    def error(self) -> float:
        return self.simulated / self.measured - 1

    @property
    def inside(self) -> bool:
        """The simulated ratio lies in the measured interval."""
        return self.low is not None and self.low <= self.simulated <= self.high


def prefill_seconds(bench: Bench) -> tuple[float, float]:
    """Of a prefill forward, and of each prompt in it, from the reference arm: the median first token at one client, and the last of a whole burst."""
    few, many = bench.concurrencies[0], bench.concurrencies[-1]
    alone = float(np.median(bench.requests(STOCK, few, "ttft")))
    burst = float(np.median([max(row["requests"]["ttft"]) for row in bench.rows[STOCK, many]]))
    each = max(0.0, (burst - alone) / (many - few))
    return alone - each * few, each


def check(step_time: Path, bench: Bench, seed: int = 0) -> list[Checked]:
    """Every ISD arm of ``bench`` at every concurrency where it was measured. Prompts leave drafts behind, as they do in the server."""
    times = MeasuredTimes(step_time, prefill_seconds(bench))
    arms = sorted({arm for arm, _ in bench.rows if arm.startswith("isd:")})
    found = []
    for c in bench.concurrencies:
        lengths = bench.requests(STOCK, c, "tokens").astype(np.int64)[None]
        load = Load(lengths, int(np.median(bench.requests(STOCK, c, "prompt_tokens"))), np.array([c]))
        ar = run(times, Fixed(AR), Acceptance((0.0,)), load, seed).total[0]
        for arm in (a for a in arms if (a, c) in bench.rows):
            name = arm.removeprefix("isd:")
            acceptance = Acceptance((0.0,)) if name == "1" else bench.acceptance(arm)
            chooses = name == "auto"  # up to the stride of the last position that was ever tried
            policy = Controlled([times], load.slots, salvage=False, seed=seed, strides=ladder(len(acceptance.linear) + 1)) if chooses else Fixed(int(name))
            got = run(times, policy, acceptance, load, seed, warm=True)
            told = bench.ratio(arm, STOCK, c)
            found.append(Checked(arm, c, float(got.total[0] / ar), told.mean, told.low, told.high, float(got.per_round[0]), bench.per_round(arm, c)))
    return found
