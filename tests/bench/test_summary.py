"""The figures: a slower arm is found, an equal one is not, intervals keep their word."""

import numpy as np
import pytest

from idlm_sglang.bench.load import Point
from idlm_sglang.bench.summary import cells, findings, ratio, throughput


def result(rng, speed=1.0, tokens=40, clients=4, answers=None, noise=0.02):
    """A point of 16 requests, 4 at a time, each of 40 tokens at about 100 tokens per second and client."""
    drift = speed * (1 + noise * rng.standard_normal())
    latency = tokens / (100 * drift) * (1 + 0.01 * rng.standard_normal(16))
    start = np.zeros(16)
    for i in range(clients, 16):
        start[i] = start[i - clients] + latency[i - clients]
    told = {
        "start": start.tolist(),
        "latency": latency.tolist(),
        "ttft": [0.01] * 16,
        "prompt_tokens": [10] * 16,
        "tokens": [tokens] * 16,
        "answer": answers or ["same"] * 16,
    }
    return {"requests": told, "steady": {"output_throughput": 400.0, "seconds": 9.0}, "serving": {"duration": 10.0}, "finished": {"stop": 12, "length": 4}, "decoding": None}


def compared(speeds, repeats=3, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    points = {Point(arm, 0.0, 4, r): result(rng, speed, **kwargs) for r in range(repeats) for arm, speed in speeds.items()}
    return cells(points, list(speeds))


def test_throughput_is_tokens_over_the_time_from_the_first_request_to_the_last_answer():
    assert throughput({"requests": {"start": [0.0, 0.5], "latency": [1.0, 1.5], "tokens": [10, 30]}}) == pytest.approx(40 / 2.0)


def test_a_slowdown_of_a_fifth_is_found_and_its_interval_holds_it():
    found = compared({"ar": 1.0, "slow": 0.8})
    assert found[1].ratio.low < 0.8 < found[1].ratio.high < 1
    assert "SLOWER at C = 4" in findings(found, "ar")[0] and "below 0.97" in findings(found, "ar")[0]


def test_of_two_equal_arms_intervals_leave_out_one_as_often_as_they_say():
    """400 comparisons of equal arms with 3 repeats: a 95 % interval leaves 1 out 20 times, give or take (binomial, 5 sigma)."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        found = ratio(list(np.exp(0.05 * rng.standard_normal(3))), list(np.exp(0.05 * rng.standard_normal(3))))
        wrong += not found.low <= 1 <= found.high
    print(f"{wrong} of 400 intervals leave 1 out")
    assert 20 - 5 * 4.4 <= wrong <= 20 + 5 * 4.4


def test_one_repeat_has_no_interval_and_proves_nothing():
    found = compared({"ar": 1.0, "slow": 0.5}, repeats=1)
    assert found[1].ratio.low is None and str(found[1].ratio) in ("0.49", "0.50", "0.51")
    assert "one repeat, no interval, at C = 4" in findings(found, "ar")[0]


def test_repeats_are_paired():
    """Drift that meets both arms of a repeat is no noise of their ratio."""
    drift = np.array([1.0, 0.5, 2.0])
    found = ratio(list(drift * [1.19, 1.20, 1.21]), list(drift))
    assert found.mean == pytest.approx(1.2, abs=0.01) and found.low > 1.15 and found.high < 1.25


def test_answers_are_compared_with_the_reference_request_by_request():
    rng = np.random.default_rng(0)
    other = ["same"] * 12 + ["other"] * 4
    points = {Point("ar", 0.0, 4, 0): result(rng), Point("isd", 0.0, 4, 0): result(rng, answers=other)}
    found = cells(points, ["ar", "isd"])
    assert (found[1].same, found[1].of) == (12, 16)
    assert "4 of 16 greedy answers at C = 4 differ" in findings(found, "ar")[0]


def test_a_steady_stretch_that_was_short_is_no_figure():
    rng = np.random.default_rng(0)
    short = {**result(rng), "steady": {"output_throughput": 900.0, "seconds": 4.0}}
    found = cells({Point("ar", 0.0, 4, 0): short, Point("isd", 0.0, 4, 0): result(rng)}, ["ar", "isd"])
    assert np.isnan(found[0].steady) and found[1].steady == 400.0 and found[1].cut == 4 / 16


def test_an_answer_without_text_has_no_time_to_its_first_token():
    rng = np.random.default_rng(0)
    one = result(rng, noise=0.0)
    one["requests"]["ttft"][:8] = [0.0] * 8
    found = cells({Point("ar", 0.0, 4, 0): one}, ["ar"])
    assert found[0].ttft[0] == 0.01


def test_time_per_token_is_not_the_gap_between_chunks():
    """40 tokens in 0.4 s, the first after 0.01 s, however few chunks they came in."""
    found = compared({"ar": 1.0, "isd": 1.0}, noise=0.0)
    assert found[1].tpot[0] == pytest.approx(0.39 / 39, rel=0.02)


def test_counts_by_position_are_summed_and_an_unknown_repeat_makes_the_cell_unknown():
    rng = np.random.default_rng(0)
    d = {"tokens_per_forward": 3.0, "queries": 7, "efficiency": 9 / 7, "introspective_acceptance": 0.9, "accepted": [9, 8, 7], "proposed": [10, 10, 10], "cold": 0.2}
    points = {Point("isd", 0.0, 4, r): {**result(rng), "decoding": d} for r in range(2)}
    points |= {Point("ar", 0.0, 4, 0): result(rng)}
    found = cells(points, ["ar", "isd"])
    assert found[0].decoding is None and found[1].decoding["accepted"] == [18, 16, 14] and found[1].decoding["tokens_per_forward"] == 3.0
