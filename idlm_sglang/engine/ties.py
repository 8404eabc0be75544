"""Whether two answers part at a near-tie: where kernels of different shape may round either way in low precision."""

import math
from dataclasses import dataclass

# How far two logits may move against each other between a verify and a decode forward, both right: four steps of the format
# at a logit of 16 to 32. float32 forgives nothing.
TOLERANCE = {"torch.bfloat16": 0.5, "torch.float16": 0.0625}


@dataclass(frozen=True)
class Parting:
    """The first position at which an answer and its check differ, as the check's forward saw it.

    Attributes:
        logprobs: log-probabilities of the answer's and of the check's token, after temperature, before truncation.
        noise: Gumbel noise of the two tokens; zeros for a greedy request.
        top: the largest log-probabilities of the position, in order.
        temperature, top_k, top_p, min_p: the request's; temperature 1 and nothing truncated for a greedy one.
    """

    logprobs: tuple[float, float]
    noise: tuple[float, float]
    top: list[float]
    temperature: float = 1.0
    top_k: int = 1 << 30
    top_p: float = 1.0
    min_p: float = 0.0


def gap(at: Parting) -> float:
    """Distance of the two tokens' noisy scores, in logits."""
    first, second = (lp + g for lp, g in zip(at.logprobs, at.noise))
    return abs(first - second) * at.temperature


def near_tie(at: Parting, tolerance: float) -> bool:
    """Whether rounding of logits by up to ``tolerance`` explains the two tokens.

    Either their scores lie that close, or the better one stands that close to the edge of top-k, top-p or min-p, so
    that one forward had it in the support and the other had not.
    """
    if tolerance <= 0:
        return False
    return gap(at) <= tolerance or _at_the_edge(at, tolerance / at.temperature)


def _at_the_edge(at: Parting, slack: float) -> bool:
    scores = [lp + g for lp, g in zip(at.logprobs, at.noise)]
    token = at.logprobs[scores.index(max(scores))]
    if at.min_p > 0 and abs(token - (at.top[0] + math.log(at.min_p))) <= slack:
        return True
    if at.top_k < len(at.top):
        last_in, first_out = at.top[at.top_k - 1 : at.top_k + 1]
        if abs(token - (first_out if token >= last_in else last_in)) <= slack:
            return True
    if at.top_p >= 1 or token < at.top[-1]:
        return False
    # Rounding moves the mass that ranks before the token, and what ranks before it.
    least = sum(math.exp(lp) for lp in at.top if lp > token + slack)
    most = sum(math.exp(lp) for lp in at.top if lp > token - slack) - math.exp(token)
    spread = 2 * slack * at.top_p * (1 - at.top_p)
    return least - spread <= at.top_p <= most + spread
