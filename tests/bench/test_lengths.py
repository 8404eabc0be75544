"""Speed by the length of the answer, of planted answers."""

import numpy as np
import pytest

from idlm_sglang.bench import lengths
from idlm_sglang.bench.load import Point
from idlm_sglang.bench.summary import cells, ratio
from idlm_sglang.bench.table import _by_length


def point(tokens, prompt_seconds, token_seconds, drift=1.0):
    latency = [drift * (prompt_seconds + token_seconds * n) for n in tokens]
    told = {"start": [0.0] * len(tokens), "latency": latency, "ttft": [0.01] * len(tokens), "prompt_tokens": [10] * len(tokens), "tokens": list(tokens), "answer": ["a"] * len(tokens)}
    return {"requests": told, "steady": {"output_throughput": 1.0, "seconds": 0.0}, "serving": {"duration": 1.0}, "finished": {"stop": len(tokens)}, "decoding": None}


def test_classes_are_octaves_behind_the_short_ones():
    assert lengths.least(np.array([0, 1, 15, 16, 31, 32, 64, 127, 128])).tolist() == [1, 1, 1, 16, 16, 32, 64, 64, 128]
    assert [lengths.name(edge) for edge in (1, 16, 64)] == ["1 to 15 tokens", "16 to 31 tokens", "64 to 127 tokens"]


def test_what_a_prompt_costs_weighs_on_short_answers_alone():
    """Twice the prompt's time and a fourth of a token's: slower on short answers, nearly four times as fast on long ones."""
    tokens = [4] * 8 + [40] * 8 + [400] * 8
    reference = [point(tokens, 0.010, 0.004, drift) for drift in (1.0, 1.5, 0.7)]
    ours = [point(tokens, 0.020, 0.001, drift) for drift in (1.0, 1.5, 0.7)]
    found = lengths.compare(ours, reference, ratio)
    assert {edge: r.mean for edge, r in found.items()} == pytest.approx({1: 0.026 / 0.024, 32: 0.170 / 0.060, 256: 1.610 / 0.420})
    assert all(r.high - r.low < 1e-9 for r in found.values()), "repeats are paired: drift is no noise"


def test_sampled_answers_of_other_lengths_do_not_bend_the_ratio():
    """Both arms alike, lengths drawn anew by each."""
    rng = np.random.default_rng(0)
    drawn = [[point(rng.integers(1, 200, 400), 0.0, 0.004) for _ in range(3)] for _ in range(2)]
    found = lengths.compare(*drawn, ratio)
    assert list(found) == [1, 16, 32, 64, 128] and all(r.mean == pytest.approx(1.0) for r in found.values())


def test_a_class_counts_in_the_repeats_where_both_arms_have_it():
    ours = [point([10, 40], 0.0, 0.002), point([10], 0.0, 0.002)]
    reference = [point([10, 40], 0.0, 0.004), point([10, 300], 0.0, 0.004)]
    found = lengths.compare(ours, reference, ratio)
    assert {edge: (r.mean, r.low is None) for edge, r in found.items()} == {1: (pytest.approx(2.0), False), 32: (pytest.approx(2.0), True)}


def test_the_table_counts_the_answers_of_the_reference():
    points = {Point("ar", 0.0, 4, r): point([10, 40, 40, 70], 0.0, 0.004) for r in range(2)}
    points |= {Point("isd", 0.0, 4, r): point([10, 40, 40, 20], 0.0, 0.002) for r in range(2)}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in _by_length(cells(points, ["ar", "isd"])).splitlines()]
    assert rows[0] == ["C", "arm", "1 to 15 tokens", "16 to 31 tokens", "32 to 63 tokens", "64 to 127 tokens"]
    assert rows[2] == ["4", "ar", "2 answers", "0 answers", "4 answers", "2 answers"]
    assert rows[3] == ["4", "isd", "2.00 (2.00 to 2.00)", "–", "2.00 (2.00 to 2.00)", "–"]
