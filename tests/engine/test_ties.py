"""What rounding of logits explains, and what it does not."""

import math

import pytest

from idlm_sglang.engine.ties import TOLERANCE, Parting, gap, near_tie

TOP = [math.log(p) for p in (0.5, 0.25, 0.15, 0.06, 0.04)]
SLACK = 0.1


def parting(old, new, noise=(0.0, 0.0), **params):
    """The answer's and the check's token by rank, under noise."""
    return Parting((TOP[old], TOP[new]), noise, TOP, **params)


def test_two_scores_as_close_as_the_tolerance_are_a_tie():
    at = Parting((-1.0, -1.09), (0.0, 0.0), TOP)
    assert gap(at) == pytest.approx(0.09) and near_tie(at, SLACK)
    assert not near_tie(Parting((-1.0, -1.2), (0.0, 0.0), TOP), SLACK)


def test_noise_counts():
    assert not near_tie(parting(0, 1), SLACK)
    assert near_tie(parting(0, 1, noise=(0.0, math.log(2))), SLACK)
    assert not near_tie(Parting((-1.0, -1.0), (0.0, 3.0), TOP), SLACK), "the noise of equal tokens parts them"


def test_the_tolerance_is_one_of_logits():
    at = Parting((-1.0, -1.5), (0.0, 0.0), TOP, temperature=0.1)
    assert gap(at) == pytest.approx(0.05) and near_tie(at, SLACK)
    assert not near_tie(Parting((-1.0, -1.09), (0.0, 0.0), TOP, temperature=2.0), SLACK)


@pytest.mark.parametrize(
    "params, tie",
    [
        ({}, False),
        ({"top_p": 0.9}, True),  # exactly 0.9 of the mass stands before rank 3
        ({"top_p": 0.99}, False),
        ({"top_p": 0.5}, False),
        ({"min_p": 0.12}, True),  # 0.06 / 0.5
        ({"min_p": 0.05}, False),
        ({"top_k": 3}, False),  # rank 3 is no neighbour of rank 2 in score
        ({"top_k": 50}, False),
    ],
)
def test_a_better_token_at_the_edge_of_the_support_is_a_tie(params, tie):
    """Rank 3 wins by its noise where it is in the support; rank 0 wins where it is not."""
    assert near_tie(parting(0, 3, noise=(0.0, 5.0), **params), SLACK) == tie
    assert near_tie(parting(3, 0, noise=(5.0, 0.0), **params), SLACK) == tie
    assert not near_tie(parting(3, 0, noise=(-5.0, 0.0), **params), SLACK), "the edge explains nothing about a worse token"


def test_the_edge_of_top_k_is_a_tie_of_its_neighbours():
    top = [-1.0, -2.0, -2.05, -4.0]
    assert near_tie(Parting((-2.0, -1.0), (5.0, 0.0), top, top_k=2), SLACK)
    assert near_tie(Parting((-2.05, -1.0), (5.0, 0.0), top, top_k=2), SLACK)
    assert not near_tie(Parting((-4.0, -1.0), (5.0, 0.0), top, top_k=3), SLACK)


def test_float32_is_forgiven_nothing():
    assert "torch.float32" not in TOLERANCE
    assert not near_tie(Parting((-1.0, -1.0), (0.0, 0.0), TOP), TOLERANCE.get("torch.float32", 0.0))
