"""What a stride is chosen from: how long a decode step takes, how many drafts are accepted and what rounds commit, all learned in service.

None of them knows a clock or SGLang: observations come in, estimates go out, and equal observations give equal estimates.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence

_SEEN = 16.0
_FORGOTTEN = 0.98
_USUAL = math.log(2)
_TRANSFER = 0.7
_FAR_TRANSFER = 0.3
_FAMILIAR = 3.0
_WINDOW = 400.0
_PRIOR_TRIES = 4.0
_EDGE = 1e-3
_ROUNDS_UNKNOWN, _ROUNDS, _TRUSTED, _RETURN = 64.0, 1024.0, 0.03, 1e-3


class StepTimes:
    """Seconds of one decode step by (running requests, stride).

    A table of batch sizes and strides to begin with, each entry with a correction that is learned. An observation moves
    the entries it was predicted from; all others follow by a part of that move, so that a machine that slows down is
    known to be slower at the strides not in use, too. What an entry learns while it is new says that the table was wrong
    there: others that were seen before do not follow. What was not seen for long is learned anew as quickly as at first.

    Args:
        table: seconds by (batch size, stride); every batch size needs every stride.

    Raises:
        ValueError: the table is empty, has gaps, or holds a time that is not positive.
    """

    def __init__(self, table: Mapping[tuple[int, int], float]):
        self.batches = sorted({batch for batch, _ in table})
        self.strides = sorted({stride for _, stride in table})
        if not table or len(table) != len(self.batches) * len(self.strides) or not all(0 < t < math.inf for t in table.values()):
            raise ValueError("step times need a positive number for every batch size and stride")
        self._table = {stride: [float(table[batch, stride]) for batch in self.batches] for stride in self.strides}
        self._moved = {stride: [0.0] * len(self.batches) for stride in self.strides}
        self._followed = {stride: [0.0] * len(self.batches) for stride in self.strides}
        self._seen = {stride: [0.0] * len(self.batches) for stride in self.strides}

    def _around(self, batch: float) -> list[tuple[int, float]]:
        """The entries that a batch size is predicted from, with their weights, which add up to 1."""
        if len(self.batches) == 1:
            return [(0, 1.0)]
        right = min(max(bisect_right(self.batches, batch), 1), len(self.batches) - 1)
        low, high = self.batches[right - 1], self.batches[right]
        share = (batch - low) / (high - low)
        return [(right - 1, 1 - share), (right, share)]

    def seconds(self, batch: float, stride: int) -> float:
        """Between the table's batch sizes linear, beyond them continued linearly (never below a tenth of the nearest)."""
        return self._read(batch, stride, 0.0)

    def hoped(self, batch: float, stride: int) -> float:
        """The same where what was not seen is taken to be as fast as it may be: an entry that only followed the others
        followed them in full where they became faster, and not at all where they became slower."""
        return self._read(batch, stride, 1.0)

    def _read(self, batch: float, stride: int, hope: float) -> float:
        table, moved, followed = self._table[stride], self._moved[stride], self._followed[stride]
        near, value = 0.0, 0.0
        for i, w in self._around(batch):
            better = followed[i] if followed[i] > 0 else followed[i] * (1 - 1 / _TRANSFER)
            now = table[i] * math.exp(moved[i] - hope * better)
            value += w * now
            if w >= 0.5:
                near = now
        return value if value > near / 10 else near / 10

    def observe(self, batch: float, stride: int, seconds: float) -> None:
        """A decode step of ``batch`` requests at ``stride`` took that long, a median of some; a single outlier moves little."""
        held = min(max(batch, self.batches[0]), self.batches[-1])
        around = [(i, w) for i, w in self._around(held) if w > 0]
        norm = sum(w * w for _, w in around)
        seen = sum(self._seen[stride][i] * w for i, w in around)
        off = math.log(seconds / self.seconds(batch, stride))
        if seen >= _FAMILIAR:
            off = max(-_USUAL, min(_USUAL, off))
        step = off / (seen + 1)
        own = dict(around)
        for other in self.strides:
            moved, followed, familiar = self._moved[other], self._followed[other], self._seen[other]
            for i in range(len(moved)):
                if other == stride and i in own:
                    moved[i] += step * own[i] / norm
                    followed[i] *= 1 - own[i]
                    familiar[i] = min(familiar[i] + own[i], _SEEN)
                    continue
                if seen >= _FAMILIAR or familiar[i] == 0:
                    part = step * (_TRANSFER if i in own else _FAR_TRANSFER)
                    moved[i] += part
                    followed[i] += part
                familiar[i] *= _FORGOTTEN


class Acceptance:
    """How likely the draft at each position is accepted, given that those before it were.

    Recent tries count most (a window of some hundred per position). A position that is not tried, because the stride in
    use has no such draft, follows the moves of the last one that is, on the scale of log odds.

    Args:
        prior: the probability to begin with.
    """

    def __init__(self, prior: float = 0.8):
        self._linear = _Positions(prior)
        self._branch = _Positions(prior)

    def observe(self, proposed: Sequence[int], accepted: Sequence[int], branch: bool = False) -> None:
        """The rounds of one step.

        Args:
            proposed: per request, drafts verified (0: a cold round, which says nothing).
            accepted: per request, how many of them were accepted, in a row from the first.
            branch: the drafts had survived a rejection (a salvage round).
        """
        (self._branch if branch else self._linear).observe(proposed, accepted)

    def linear(self) -> list[float]:
        """P(draft j + 1 accepted | drafts 1..j accepted) up to the last position ever tried; the prior before that."""
        return self._linear.values()

    def branch(self) -> list[float]:
        """The same for drafts that survived a rejection."""
        return self._branch.values()


class _Positions:
    def __init__(self, prior: float):
        self._prior = prior
        self._p: list[float] = []
        self._tries: list[float] = []

    def values(self) -> list[float]:
        return list(self._p) or [self._prior]

    def observe(self, proposed: Sequence[int], accepted: Sequence[int]) -> None:
        deepest = max((min(c, r + 1) for c, r in zip(proposed, accepted)), default=0)
        while len(self._p) < deepest:
            self._p.append(self._p[-1] if self._p else self._prior)
            self._tries.append(_PRIOR_TRIES)
        longest, move = max(proposed, default=0), 0.0
        for j, before in enumerate(self._p):
            tried = sum(c > j and r >= j for c, r in zip(proposed, accepted))
            if tried:
                right = sum(c > j and r > j for c, r in zip(proposed, accepted))
                self._p[j] += (right - tried * before) / (self._tries[j] + tried)
                self._tries[j] = min(self._tries[j] + tried, _WINDOW)
            if j == longest - 1:
                move = _log_odds(self._p[j]) - _log_odds(before)
            elif j >= longest:
                # Only what no request proposed follows: a draft behind a rejected one was there to be tried, and to follow
                # the rejections in front of it alone would pull it down.
                self._p[j] = 1 / (1 + math.exp(-_log_odds(before) - move))


def _log_odds(p: float) -> float:
    p = min(max(p, _EDGE), 1 - _EDGE)
    return math.log(p / (1 - p))


class Yields:
    """Tokens that a round commits over those expected of it, by stride; 1 to begin with, and always at stride 1.

    What is expected takes all requests for alike (:func:`~idlm_sglang.isd.stride.tokens_per_round`). Where some are easy to draft for and others are not,
    the easy ones' long runs raise what is known of far positions, and the hard ones, which have most of the rounds, never reach them: at wide strides
    too much is expected. A small difference is taken for noise. What rounds commit is seen only at the stride in use. Others follow its moves in part,
    narrower ones the less the narrower, once it is known; and what they were seen to commit is forgotten, slowly: they come to be taken for like it.
    """

    def __init__(self, strides: Sequence[int]):
        self._moved = dict.fromkeys((n for n in strides if n > 1), 0.0)
        self._seen = dict.fromkeys(self._moved, 0.0)

    def of(self, stride: int) -> float:
        """The factor of a stride."""
        moved = self._moved.get(stride, 0.0)
        return math.exp(math.copysign(max(abs(moved) - _TRUSTED, 0.0), moved))

    def observe(self, stride: int, rounds: int, over_expected: float) -> None:
        """``rounds`` at ``stride`` committed so many times what was expected of them, without the factor; > 0."""
        if rounds <= 0 or (stride > 1 and stride not in self._moved):
            return
        step = moved = seen = 0.0
        if stride > 1:
            seen = self._seen[stride]
            # The mean of the factor, not that of its logarithm: few rounds waver, and would be taken for fewer tokens than they are.
            off = over_expected / math.exp(self._moved[stride]) - 1
            step = math.log1p(off * rounds / (_ROUNDS_UNKNOWN + seen + rounds))
            self._seen[stride] = min(seen + rounds, _ROUNDS)
            self._moved[stride] = moved = self._moved[stride] + step
        for other in self._moved:
            if other == stride:
                continue
            share = min((other - 1) / max(stride - 1, 1), 1.0)
            if seen >= _ROUNDS_UNKNOWN or self._seen[other] < 1:
                self._moved[other] += _TRANSFER * share * step
            self._moved[other] += _RETURN * (share * moved - self._moved[other])
            self._seen[other] *= _FORGOTTEN
