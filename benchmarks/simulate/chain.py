"""One round of every running request: the Markov chain of drafts, drawn request by request.

A request has c valid drafts of a linear chain (c = 0: a cold round), or, with salvage, the survivors of a rejection.

    c drafts:     r accepted, r + 1 tokens committed. r = c: K = N - 1 new drafts. r < c: K survivors with salvage, nothing without.
    s survivors:  r accepted, r + 1 tokens committed, K - r drafts stay valid.

A narrower stride keeps the first K of what there is; stride 1 keeps nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_DRAFTS = 15


@dataclass(frozen=True)
class Acceptance:
    """P(a draft is accepted | those before it were), by position; the last value goes on.

    linear: drafts of MASK rows, verified in a chain. branch: survivors of a rejection, or None without salvage.
    """

    linear: tuple[float, ...]
    branch: tuple[float, ...] | None = None

    def __post_init__(self):
        object.__setattr__(self, "_runs", tuple(None if p is None else _ladder(p) for p in (self.linear, self.branch)))

    def runs(self, uniform: np.ndarray, branch: bool) -> np.ndarray:
        """Accepted drafts if there were endlessly many, from one uniform number each: P(run >= j) = p_1 .. p_j."""
        return np.searchsorted(self._runs[branch], -uniform, side="left")


def _ladder(by_position: Sequence[float]) -> np.ndarray:
    values = list(by_position) or [0.0]
    return -np.cumprod(values[:MAX_DRAFTS] + [values[-1]] * max(0, MAX_DRAFTS - len(values)))


@dataclass
class Drafts:
    """State of every slot, shape (set-ups, slots): valid drafts of a chain, and survivors to verify. At most one of the two is above 0."""

    linear: np.ndarray
    survivors: np.ndarray

    @classmethod
    def none(cls, shape: tuple[int, int]) -> "Drafts":
        return cls(np.zeros(shape, np.int64), np.zeros(shape, np.int64))


@dataclass(frozen=True)
class Round:
    """What a round did, shape (set-ups, slots): drafts verified, of these accepted, and whether they were survivors. r + 1 tokens are committed."""

    proposed: np.ndarray
    accepted: np.ndarray
    branch: np.ndarray


def advance(drafts: Drafts, stride: np.ndarray, uniform: np.ndarray, acceptance: Acceptance) -> Round:
    """One round at ``stride`` (shape (set-ups, 1), 1 or more); ``drafts`` are changed in place."""
    most = stride - 1
    linear = np.minimum(drafts.linear, most)
    survivors = np.minimum(drafts.survivors, most)
    branch = survivors > 0
    proposed = linear + survivors
    accepted = np.minimum(proposed, acceptance.runs(uniform, False))
    if acceptance.branch is not None:
        accepted = np.where(branch, np.minimum(survivors, acceptance.runs(uniform, True)), accepted)
    rejected = ~branch & (accepted < proposed)
    drafts.linear = np.where(branch, most - accepted, np.where(rejected, 0, most + np.zeros_like(linear)))
    drafts.survivors = np.where(rejected, most, 0) if acceptance.branch is not None else np.zeros_like(survivors)
    return Round(proposed, accepted, branch)
