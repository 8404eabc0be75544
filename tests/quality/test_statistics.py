"""Intervals and verdicts: what they must hold on known and on simulated scores."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from idlm_sglang.quality import statistics
from idlm_sglang.quality.statistics import BETTER, PARITY, UNDECIDED, WORSE

_Z2 = stats.norm.ppf(0.975) ** 2


def pairs(both: int, gained: int, lost: int, neither: int) -> tuple[list[int], list[int]]:
    """(arm, reference) right/wrong scores with so many questions of each kind."""
    return [1] * both + [1] * gained + [0] * lost + [0] * neither, [1] * both + [0] * gained + [1] * lost + [0] * neither


def score_limits(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Tango's interval by brute force: the likelihood maximised numerically on a grid of differences."""
    kept = []
    for delta in np.linspace(-0.999, 0.999, 2001):

        def minus_log(p_lost):
            parts = (gained, p_lost + delta), (lost, p_lost), (n - gained - lost, 1 - 2 * p_lost - delta)
            return -sum(count * math.log(max(share, 1e-300)) for count, share in parts if count)

        found = optimize.minimize_scalar(minus_log, bounds=(max(0, -delta), (1 - delta) / 2), method="bounded", options={"xatol": 1e-10})
        p_lost = found.x
        variance = n * (2 * p_lost + delta - delta**2)
        if (gained - lost - n * delta) ** 2 <= _Z2 * variance:
            kept.append(delta)
    return min(kept), max(kept)


@pytest.mark.parametrize(("gained", "lost", "n"), [(9, 1, 50), (3, 7, 100), (5, 5, 40), (0, 4, 30)])
def test_the_paired_interval_is_the_inverted_score_test(gained, lost, n):
    assert statistics.tango(gained, lost, n) == pytest.approx(score_limits(gained, lost, n), abs=2e-3)


def test_the_paired_interval_covers_the_true_difference_as_often_as_it_says():
    rng, n, trials = np.random.default_rng(5), 100, 2000
    p_gained, p_lost = 0.06, 0.02
    kinds = rng.multinomial(n, [p_gained, p_lost, 1 - p_gained - p_lost], trials)
    limits = [statistics.tango(gained, lost, n) for gained, lost, _ in kinds]
    covered = np.mean([low <= p_gained - p_lost <= high for low, high in limits])
    print(f"coverage {covered:.3f} of 0.95")
    assert 0.93 <= covered <= 0.985


def test_without_any_difference_the_interval_still_has_the_width_that_the_number_of_questions_allows():
    found = statistics.difference(*pairs(30, 0, 0, 10))
    assert found.mean == 0 and found.high == pytest.approx(_Z2 / (40 + _Z2)) and found.low == pytest.approx(-found.high)
    repeated = statistics.difference([0.5, 0.25] * 20, [0.5, 0.25] * 20)
    assert (repeated.low, repeated.high) == pytest.approx((found.low, found.high))


@pytest.mark.parametrize(
    ("counts", "margin", "word"),
    [
        ((150, 0, 0, 50), 0.03, PARITY),
        ((20, 0, 0, 5), 0.03, UNDECIDED),
        ((100, 2, 30, 68), 0.03, WORSE),
        ((100, 30, 2, 68), 0.03, BETTER),
        ((480, 10, 10, 500), 0.03, PARITY),
        ((4000, 10, 60, 5930), 0.03, PARITY),  # a difference for certain, and a small one
        ((40, 6, 9, 45), 0.03, UNDECIDED),
    ],
)
def test_the_verdict_follows_from_the_interval_and_the_margin(counts, margin, word):
    found, verdict = statistics.verdict(*pairs(*counts), margin)
    print(found, verdict)
    assert verdict.word == word
    assert (verdict.more is not None) == (word == UNDECIDED)


@pytest.mark.parametrize("counts", [(20, 0, 0, 5), (40, 6, 9, 45), (30, 2, 2, 30)])
def test_with_the_further_questions_it_asks_for_it_decides(counts):
    n = sum(counts)
    more = statistics.verdict(*pairs(*counts), 0.03)[1].more
    for total, enough in ((n + more, True), (n + more - 1, False)):
        ends = statistics.Interval(0, *statistics.tango(counts[1] * total / n, counts[2] * total / n, total))
        assert (statistics._word(ends, ends, 0.03) != UNDECIDED) == enough


def test_one_line_among_many_needs_more_to_be_called_worse():
    arms = pairs(60, 3, 13, 24)
    assert statistics.verdict(*arms, 0.03)[1].word == WORSE
    found, verdict = statistics.verdict(*arms, 0.03, among=14)
    assert verdict.word == UNDECIDED and found.high < 0 and verdict.more > 0
    assert statistics.verdict(*pairs(150, 0, 0, 50), 0.03, among=14)[1].word == PARITY


def test_a_score_has_wilsons_interval_or_a_bootstrap_over_questions():
    found = statistics.score([1] * 90 + [0] * 10)
    assert (found.low, found.high) == pytest.approx((0.8256, 0.9448), abs=1e-3)
    rng = np.random.default_rng(1)
    values = rng.integers(0, 5, 400) / 4
    found, error = statistics.score(values), values.std() / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=4e-3)
    assert statistics.score(values) == found, "the same scores give the same interval"
