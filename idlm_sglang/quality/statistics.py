"""Intervals and verdicts for scores that two arms got on the same questions. Intervals are two-sided, 95 % unless said otherwise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
_RESAMPLES = 9999
_EDGE = 1e-12
_MOST = 10_000_000  # questions beyond which "more questions" says nothing

PARITY, WORSE, BETTER, UNDECIDED = "parity", "worse", "better", "undecided"


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, as shares (0.01 is one point)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """What the questions say about an arm beside the reference.

    Attributes:
        word: ``parity``, ``worse``, ``better`` or ``undecided``.
        more: for ``undecided``, about how many further questions would decide it at the rates seen; None where no
            number below ten million would (a difference as large as the margin).
    """

    word: str
    more: int | None = None


def score(values: Sequence[float]) -> Interval:
    """Mean score of n questions: Wilson's interval for right/wrong scores, else a BCa bootstrap over the questions."""
    x = np.asarray(values, dtype=float)
    if _right_or_wrong(x):
        found = stats.binomtest(int(x.sum()), len(x)).proportion_ci(CONFIDENCE, method="wilson")
        return Interval(float(x.mean()), float(found.low), float(found.high))
    return _bootstrap(x, 0.0, 1.0, CONFIDENCE)


def difference(arm: Sequence[float], reference: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean of arm minus reference over the same n questions.

    Right/wrong scores: Tango's score interval for a difference of paired proportions (Statistics in Medicine 17, 1998).
    It stays honest where few questions differ: when none does it is +- z^2 / (n + z^2), not zero. Other scores (means
    over repeats): a BCa bootstrap over the questions, never narrower than that.
    """
    a, r = np.asarray(arm, dtype=float), np.asarray(reference, dtype=float)
    if a.shape != r.shape or not len(a):
        raise ValueError("arm and reference need the same questions, at least one")
    if _right_or_wrong(a) and _right_or_wrong(r):
        gained, lost = int(np.sum(a > r)), int(np.sum(a < r))
        return Interval(float(np.mean(a - r)), *tango(gained, lost, len(a), confidence))
    return _bootstrap(a - r, -1.0, 1.0, confidence)


def tango(gained: float, lost: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Limits of p(gained) - p(lost) where ``gained`` and ``lost`` of n pairs differ, by inverting the score test."""

    def statistic(delta: float) -> float:
        # The likeliest p(lost) under p(gained) - p(lost) = delta is the larger root of a quadratic.
        b = -gained - lost + (2 * n - gained + lost) * delta
        c = -lost * delta * (1 - delta)
        p_lost = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * p_lost + delta * (1 - delta))
        return (gained - lost - n * delta) / math.sqrt(max(variance, 1e-300))

    def limit(target: float) -> float:
        low, high = -1 + _EDGE, 1 - _EDGE
        if statistic(low) <= target:
            return -1.0
        if statistic(high) >= target:
            return 1.0
        return float(optimize.brentq(lambda delta: statistic(delta) - target, low, high, xtol=1e-9))

    z = _z(confidence)
    return limit(z), limit(-z)


def verdict(arm: Sequence[float], reference: Sequence[float], margin: float, among: int = 1) -> tuple[Interval, Verdict]:
    """The paired difference (95 %) and what it says under ``margin`` (a share).

    ``parity``: the whole interval lies inside +- margin. Else ``worse`` or ``better``: the interval of confidence
    1 - 5 % / ``among`` lies on one side of zero, so that of ``among`` verdicts on equal arms one in twenty such sets has a
    wrong one, not every other set (Bonferroni). Else ``undecided``.
    """
    found, strict = difference(arm, reference), difference(arm, reference, _strict(among))
    word = _word(found, strict, margin)
    return found, Verdict(word, _more(arm, reference, found, margin, among) if word == UNDECIDED else None)


def _word(found: Interval, strict: Interval, margin: float) -> str:
    if -margin < found.low and found.high < margin:
        return PARITY
    if strict.high < 0:
        return WORSE
    return BETTER if strict.low > 0 else UNDECIDED


def _more(arm: Sequence[float], reference: Sequence[float], found: Interval, margin: float, among: int) -> int | None:
    a, r = np.asarray(arm, dtype=float), np.asarray(reference, dtype=float)
    n = len(a)
    exact = _right_or_wrong(a) and _right_or_wrong(r)
    gained, lost = float(np.sum(a > r)), float(np.sum(a < r))

    def grown(total: int, confidence: float) -> Interval:
        """The interval that ``total`` questions would give at the rates seen; half-widths go with one over the square root."""
        if exact:
            return Interval(found.mean, *tango(gained * total / n, lost * total / n, total, confidence))
        floor, shrink = _floor(total, confidence), math.sqrt(n / total) * _z(confidence) / _z(CONFIDENCE)
        below, above = (found.mean - found.low) * shrink, (found.high - found.mean) * shrink
        return Interval(found.mean, found.mean - max(below, floor), found.mean + max(above, floor))

    def decided(total: int) -> bool:
        return _word(grown(total, CONFIDENCE), grown(total, _strict(among)), margin) != UNDECIDED

    low, high = n, 2 * n
    while not decided(high):
        low, high = high, 2 * high
        if high > _MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return high - n


def _strict(among: int) -> float:
    return 1 - (1 - CONFIDENCE) / among


def _z(confidence: float) -> float:
    return float(stats.norm.ppf(0.5 + confidence / 2))


def _right_or_wrong(x: np.ndarray) -> bool:
    return bool(np.all((x == 0) | (x == 1)))


def _floor(n: float, confidence: float) -> float:
    return _z(confidence) ** 2 / (n + _z(confidence) ** 2)


def _bootstrap(x: np.ndarray, lowest: float, highest: float, confidence: float) -> Interval:
    mean, floor = float(x.mean()), _floor(len(x), confidence)
    low = high = mean
    if np.ptp(x) > 0:
        found = stats.bootstrap((x,), np.mean, confidence_level=confidence, n_resamples=_RESAMPLES, method="BCa", rng=np.random.default_rng(0))
        low, high = float(found.confidence_interval.low), float(found.confidence_interval.high)
    return Interval(mean, max(min(low, mean - floor), lowest), min(max(high, mean + floor), highest))
