"""Step times measured by `benchmarks.step_time`, as the loop wants them."""

from pathlib import Path

import numpy as np

from benchmarks.step_time import report, store


class MeasuredTimes:
    """Median step times of a results folder, one set-up: linear between batches and contexts, and beyond them held in context, continued in batch.

    Strides without rows of their own are interpolated in N; a stride's contexts are those it was measured at. prefill: seconds of a prefill forward, and of each prompt in it more.
    """

    def __init__(self, folder: Path, prefill: tuple[float, float]):
        points = report.points(store.read(folder)["rows"])
        self.prefill_seconds = prefill
        self._contexts = sorted({p.context for p in points})
        self.measured_strides = sorted({p.stride for p in points})
        # By (stride, context): batches and seconds.
        self._curves = {}
        for n in self.measured_strides:
            for c in self._contexts:
                mine = sorted((p.batch, p.wall / 1e3) for p in points if (p.stride, p.context) == (n, c))
                if mine:
                    self._curves[n, c] = tuple(np.array(x) for x in zip(*mine))

    def decode(self, stride: np.ndarray, running: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return np.array([self._one(int(n), float(b), float(k) / max(1, b)) for n, b, k in zip(stride, running, columns)])

    def _one(self, stride: int, batch: float, context: float) -> float:
        if batch == 0:
            return 0.0
        if stride not in self.measured_strides:
            around = [n for n in self.measured_strides if n > 0]
            return float(np.interp(stride, around, [self._one(n, batch, context) for n in around]))
        contexts = [c for c in self._contexts if (stride, c) in self._curves]
        return float(np.interp(context, contexts, [_line(batch, *self._curves[stride, c]) for c in contexts]))

    def prefill(self, requests: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return self.prefill_seconds[0] + self.prefill_seconds[1] * np.asarray(requests, dtype=float)


def _line(x: float, xs: np.ndarray, ys: np.ndarray) -> float:
    i = int(np.clip(np.searchsorted(xs, x), 1, len(xs) - 1))
    return float(ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1]))
