"""Speed by the length of the answer: a prompt's forward and its waits weigh on short answers, the step's speed-up shows in long ones."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

SHORT = 16  # answers below are one class; behind it a class holds lengths up to twice its least

Rates = list[float]  # paired by repeat


def least(tokens: np.ndarray) -> np.ndarray:
    """The least length, in tokens, of the class of each answer: 1, 16, 32, 64, ..."""
    octave = 2.0 ** np.floor(np.log2(np.maximum(tokens, 1)))
    return np.where(octave < SHORT, 1, octave).astype(int)


def counts(results: list[dict[str, Any]]) -> dict[int, int]:
    """Answers of each class, all repeats together."""
    found, number = np.unique(np.concatenate([least(np.asarray(r["requests"]["tokens"])) for r in results]), return_counts=True)
    return dict(zip(found.tolist(), number.tolist()))


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], ratio: Callable[[Rates, Rates], Any]) -> dict[int, Any]:
    """``ratio`` of each class's rates in repeats paired by their place; a repeat counts where both arms have answers of the class.

    A rate is an arm's tokens over the latencies of its own answers of that class, in tokens per second: where sampled answers differ,
    taking one arm's lengths for both would call the other one's longer answers slow.
    """
    rates = [[_rates(r["requests"]) for r in results] for results in (ours, theirs)]
    found = {}
    for edge in sorted({edge for pair in zip(*rates) for edge in pair[0].keys() & pair[1].keys()}):
        pairs = [(a[edge], b[edge]) for a, b in zip(*rates) if edge in a and edge in b]
        found[edge] = ratio([a for a, _ in pairs], [b for _, b in pairs])
    return found


def _rates(told: dict[str, list]) -> dict[int, float]:
    tokens, latency = np.asarray(told["tokens"]), np.asarray(told["latency"])
    classes = least(tokens)
    return {int(edge): math.fsum(tokens[classes == edge]) / math.fsum(latency[classes == edge]) for edge in np.unique(classes)}


def name(edge: int) -> str:
    """Of a class, for a table."""
    return f"{edge} to {max(2 * edge, SHORT) - 1} tokens"
