"""The tests of distributions raise as many false alarms as they say, and see a difference that is there."""

import numpy as np

from idlm_sglang.parity.statistics import holm, two_sample


def test_equal_distributions_alarm_at_the_stated_rate_and_different_ones_nearly_always():
    rng = np.random.default_rng(0)
    runs, tests, n, alpha = 150, 11, 200, 0.05
    shape = np.array([0.4, 0.2, 0.15, 0.1, 0.05, 0.05, 0.03, 0.02])
    other = np.array([0.2, 0.4, 0.15, 0.1, 0.05, 0.05, 0.03, 0.02])

    def alarm(second):
        ps = [two_sample(rng.choice(8, n, p=shape).tolist(), rng.choice(8, n, p=second).tolist())[0] for _ in range(tests)]
        return min(holm(ps)) < alpha

    false = np.mean([alarm(shape) for _ in range(runs)])
    print(f"false alarms: {false:.3f} of {runs} runs of {tests} tests at alpha {alpha}")
    # Three standard deviations above what is promised.
    assert false <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / runs)
    assert np.mean([alarm(other) for _ in range(50)]) > 0.95


def test_holm_multiplies_the_smallest_by_the_number_of_tests_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_answers_that_are_all_the_same_leave_nothing_to_test():
    assert two_sample(["a"] * 50, ["a"] * 50) == (1.0, 1)
