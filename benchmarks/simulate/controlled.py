"""The server's own stride controller, one for each set-up, on simulated steps."""

import numpy as np

from benchmarks.simulate.chain import Round
from benchmarks.simulate.loop import Times
from idlm_sglang.isd.stride import StepTimes, StrideController, ladder

STRIDES = ladder(8)
START_CONTEXT = 256
"""Tokens in a request's cache where `engine.calibrate` measures step times at start-up: fewer than in service."""


class Controlled:
    """Lets a `StrideController` decide for every set-up.

    Args:
        times: of the set-ups, given as ``parts``: one `Times` for each.
        slots: requests that run at a time, per set-up; tables go up to there.
        salvage: see `StrideController`.
        noise: standard deviation of the logarithm of each step time that a controller sees.
    """

    def __init__(self, parts: list[Times], slots: np.ndarray, salvage: bool, noise: float = 0.02, seed: int = 0, strides: tuple[int, ...] = STRIDES):
        self._controllers = [StrideController(times=StepTimes(table(times, int(most), strides)), strides=strides, salvage=salvage) for times, most in zip(parts, slots)]
        self._steps = [0] * len(parts)
        self._random = np.random.default_rng(seed)
        self._noise = noise
        self._stride = np.ones(len(parts), np.int64)
        self.changes = np.zeros(len(parts), np.int64)

    def strides(self, running: np.ndarray) -> np.ndarray:
        for i, controller in enumerate(self._controllers):
            if running[i]:
                if self._steps[i] % controller.policy.interval == 0:
                    before, self._stride[i] = self._stride[i], controller.decide(int(running[i]))
                    self.changes[i] += before != self._stride[i]
                self._steps[i] += 1
        return self._stride.copy()

    def observe(self, running: np.ndarray, stride: np.ndarray, seconds: np.ndarray, done: Round, active: np.ndarray) -> None:
        seen = seconds * np.exp(self._noise * self._random.standard_normal(len(seconds)))
        for i, controller in enumerate(self._controllers):
            if not running[i]:
                continue
            controller.observe_step(int(running[i]), int(stride[i]), float(seen[i]))
            controller.observe_tokens(int(stride[i]), int((done.accepted[i, active[i]] + 1).sum()), int(active[i].sum()))
            for branch in (False, True):
                mine = active[i] & (done.branch[i] == branch) & (done.proposed[i] > 0)
                if mine.any():
                    controller.observe_rounds(done.proposed[i, mine].tolist(), done.accepted[i, mine].tolist(), branch)


def table(times: Times, most: int, strides: tuple[int, ...], context: int = START_CONTEXT) -> dict[tuple[int, int], float]:
    """Step times as measured at start-up: batch sizes 1, 4, 16, .. and ``most``, short contexts (`engine.calibrate`, which needs the engine)."""
    batches = sorted({4**k for k in range(8) if 4**k < most} | {most})
    return {(b, n): float(times.decode(np.array([n]), np.array([b]), np.array([b * context]))[0]) for b in batches for n in strides}
