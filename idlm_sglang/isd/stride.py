"""Which stride to use now: the one that commits the most tokens per second, as far as is known.

A step of stride N costs more the more requests run, and brings more tokens the better drafts are accepted. Both are
estimated (:mod:`idlm_sglang.isd.estimates`); the expected tokens of a round follow from a Markov chain over rounds, and are corrected by those
that rounds turn out to commit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from idlm_sglang.isd.estimates import Acceptance, StepTimes, Yields

__all__ = ["Acceptance", "Choice", "Policy", "StepTimes", "StrideController", "Yields", "choose", "in_answers", "ladder", "tokens_per_round"]

_LADDER = (1, 2, 3, 4, 6, 8, 12, 16)


def ladder(largest: int) -> tuple[int, ...]:
    """The strides to choose from: 1, 2, 3, 4, 6, 8, 12, 16 up to ``largest``, which is always one of them."""
    return tuple(sorted({n for n in _LADDER if n <= largest} | {largest}))


def _runs(p: Sequence[float], k: int) -> list[float]:
    """P(at least r of k drafts are accepted) for r = 0..k."""
    out = [1.0]
    for j in range(k):
        out.append(out[-1] * (p[min(j, len(p) - 1)] if p else 0.0))
    return out


def tokens_per_round(linear: Sequence[float], branch: Sequence[float] | None, stride: int) -> float:
    """Expected committed tokens per round of one request, in the long run.

    The states of the chain, with K = stride - 1: L_c, a round with c drafts from MASK rows (L_0 is the cold one), and with
    salvage S, a round with K drafts that survived a rejection. A round that accepts r drafts commits r + 1 tokens. From L_c
    the next is L_K where r = c, else S (L_0 without salvage); from S it is L_{K-r}.

    Args:
        linear: P(draft j + 1 accepted | drafts 1..j accepted) in L; positions behind the end continue its last value, none is 0.
        branch: the same in S, or None without salvage.
        stride: N >= 1.

    Returns:
        1.0 to N. Constant p without salvage gives (2 + p + .. + p^(N-2)) / (2 - p^(N-1)).
    """
    k = stride - 1
    if k < 1:
        return 1.0
    reach = _runs(linear, k)
    stay = reach[k]
    if branch is None:
        return (sum(reach) + 1 - stay) / (2 - stay)
    # One cycle from S to S: S, L_{K-r}, and L_K as often as it repeats itself; all scaled by 1 - P(L_K repeats).
    survive = _runs(branch, k)
    tokens, rounds = (1 - stay) * sum(survive), 2 * (1 - stay)
    expected = 0.0
    for c in range(k + 1):
        r = k - c
        ends = survive[r] - (survive[r + 1] if r < k else 0.0)
        expected += reach[c]
        tokens += ends * ((1 - stay) * expected + reach[c] * sum(reach))
        rounds += ends * reach[c]
    return tokens / rounds


def in_answers(tokens: float, length: float) -> float:
    """Tokens per round over whole answers of which decode steps commit ``length`` tokens, where ``tokens`` are expected per round in the long run.

    An answer's last round loses half of what it might have committed beyond its first token. Short answers gain less from wide strides.
    """
    return tokens if math.isinf(length) else length / max((length + (tokens - 1) / 2) / tokens, 1.0)


@dataclass(frozen=True)
class Choice:
    """What a stride was chosen by.

    Attributes:
        stride: the one chosen.
        expected: of each stride, tokens per second where stride 1 gives 1.
        seconds, tokens: of each stride, seconds of a step and tokens of a round, which that is made of.
    """

    stride: int
    expected: Mapping[int, float]
    seconds: Mapping[int, float]
    tokens: Mapping[int, float]


def choose(
    times: StepTimes,
    linear: Sequence[float],
    branch: Sequence[float] | None,
    batch: int,
    strides: Sequence[int],
    current: int | None = None,
    hysteresis: float = 0.0,
    length: float = math.inf,
    yields: Yields | None = None,
) -> Choice:
    """The stride with the most expected tokens per second at ``batch`` running requests.

    ``current`` is kept unless the best beats it by more than the share ``hysteresis``; among equals the smaller one is
    taken. ``length``: tokens of an answer (:func:`in_answers`). ``yields``: what rounds commit over what is expected; None: just that.
    Depends on nothing but its arguments.
    """
    seconds = {n: times.seconds(batch, n) for n in sorted(strides)}
    tokens = {n: in_answers(tokens_per_round(linear, branch, n), length) for n in seconds}
    if yields is not None:
        tokens = {n: min(max(expected * yields.of(n), 1.0), n) for n, expected in tokens.items()}
    rate = {n: tokens[n] / seconds[n] for n in seconds}
    single = 1 / times.seconds(batch, 1) if 1 in times.strides else next(iter(rate.values()))
    expected = {n: r / single for n, r in rate.items()}
    best = max(expected, key=expected.get)
    if current in expected and expected[best] <= expected[current] * (1 + hysteresis):
        best = current
    return Choice(best, expected, seconds, tokens)


@dataclass(frozen=True)
class Policy:
    """How a :class:`StrideController` goes about it.

    Attributes:
        interval: decode steps per decision.
        hysteresis: a share of speed that is not worth a change.
        dwell: decisions between two changes, unless the second one brings a quarter or the batch changed by half.
        explore: largest share of decode time that may be lost to trying strides not in use.
        credit: steps' worth of trials that a server begins with.
        savings: the most that may be saved up: one trial of the widest stride where a step takes several times as long.
        patience: decisions after which a stride that is not in use is hoped to be twice as good as last known; one that
            was never used at about this batch size is at once.
        doubt: a gain over stride 1 below which this stride is looked at eight times as often: it is close, and all others are measured by it.
        trial: decisions that one trial lasts.
    """

    interval: int = 4
    hysteresis: float = 0.03
    dwell: int = 4
    explore: float = 0.005
    credit: int = 16
    savings: int = 64
    patience: int = 2000
    doubt: float = 1.3
    trial: int = 2


_URGENT = 1.25
_OTHER_BATCH = 1.5
# Answers that their mean length is taken over.
_ANSWERS = 64
_MANY_ROUNDS = 1024


@dataclass
class _Trial:
    stride: int
    left: int
    seconds: float = 0.0


@dataclass
class StrideController:
    """Decides the stride every ``policy.interval`` decode steps; equal observations give equal decisions.

    What is not in use is not seen: drafts behind the stride's own, and the step times of other strides. So now and then
    another stride is tried for some steps, the more likely the better it is expected to be and the longer it was not seen.
    A trial starts only where even one that accepts nothing costs no more than the time saved up for it, the share ``explore``
    of all decode time, and ``credit`` steps' worth to begin with. Against the best fixed stride under lasting conditions that loses
    ``explore + hysteresis`` in the long run, and the same against stride 1, which is one of the strides.

    Args:
        times: step times to begin with.
        strides: what to choose from; with 1 among them.
        salvage: rounds behind a rejection carry drafts that survived it.
    """

    times: StepTimes
    strides: Sequence[int]
    salvage: bool = False
    policy: Policy = field(default_factory=Policy)
    acceptance: Acceptance = field(default_factory=Acceptance)

    def __post_init__(self):
        self.choice: Choice | None = None
        self._settled: int | None = None
        self._batch = 0
        self._since = 0
        # By (nearest batch size of the table, stride): decisions there until the stride was last in use.
        self._used: dict[tuple[int, int], int] = {}
        self._decisions: dict[int, int] = {}
        self._trial: _Trial | None = None
        self._saved: float | None = None
        self._lately: list[tuple[int, float]] = []
        self._lately_at = 0
        self._answered = (0.0, 0.0)
        self._yields = Yields(self.strides)
        self._committed_at, self._committed = 0, (0, 0)

    @property
    def stride(self) -> int:
        """The stride in use, on trial or for good; the largest before the first decision."""
        if self._trial is not None:
            return self._trial.stride
        return self._settled if self._settled is not None else max(self.strides)

    @property
    def on_trial(self) -> bool:
        """The stride in use is one that is being tried."""
        return self._trial is not None

    def observe_step(self, batch: int, stride: int, seconds: float) -> None:
        """A decode step of ``batch`` requests at ``stride`` took ``seconds``."""
        if stride not in self.times.strides or seconds <= 0:
            return
        if self._lately and (stride != self._lately_at or abs(batch - self._lately[0][0]) > batch / 8):
            self._look_back()
        self._lately_at = stride
        self._lately.append((batch, seconds))
        if len(self._lately) == self.policy.interval:
            self._look_back()
        typical = self.times.seconds(batch, stride)
        if self._trial is not None and stride == self._trial.stride:
            self._trial.seconds += typical
        if self._saved is None:
            self._saved = self.policy.credit * typical
        self._saved = min(self._saved + self.policy.explore * typical, self.policy.savings * typical)

    def _look_back(self) -> None:
        """The steps since the last look, much alike, are one observation."""
        batch = sum(batch for batch, _ in self._lately) / len(self._lately)
        self.times.observe(batch, self._lately_at, median(seconds for _, seconds in self._lately))
        self._lately.clear()

    def observe_rounds(self, proposed: Sequence[int], accepted: Sequence[int], branch: bool = False) -> None:
        """Drafts verified and accepted, per request of one step, as :meth:`Acceptance.observe` takes them."""
        self.acceptance.observe(proposed, accepted, branch)

    def observe_answers(self, tokens: int, answers: int) -> None:
        """``tokens`` were committed lately and ``answers`` ended; recent ones count most."""
        keep = 1 - min(answers / _ANSWERS, 1.0)
        self._answered = (self._answered[0] * keep + tokens, self._answered[1] * keep + answers)

    def observe_tokens(self, stride: int, tokens: int, rounds: int) -> None:
        """The ``rounds`` of a step at ``stride`` committed ``tokens``. In the order of the steps; they may be late."""
        if stride == self._committed_at:
            self._committed = self._committed[0] + tokens, self._committed[1] + rounds
            # At a stride that was forced nobody decides.
            if self._committed[1] >= _MANY_ROUNDS:
                self._look_at_tokens()
        else:
            # The first step of a stride brings the drafts of another.
            self._look_at_tokens()
            self._committed_at = stride

    def _look_at_tokens(self) -> None:
        """What the steps of a stride committed since the last look is one observation."""
        (tokens, rounds), self._committed = self._committed, (0, 0)
        if tokens > 0:
            linear, branch, length = self._known()
            expected = in_answers(tokens_per_round(linear, branch, self._committed_at), length)
            self._yields.observe(self._committed_at, rounds, tokens / rounds / expected)

    def _known(self) -> tuple[list[float], list[float] | None, float]:
        """Acceptance of drafts and of survivors, and the length of answers."""
        tokens, answers = self._answered
        length = max(tokens / answers, 1.0) if answers else math.inf
        return self.acceptance.linear(), self.acceptance.branch() if self.salvage else None, length

    def decide(self, batch: int) -> int:
        """The stride for the next ``policy.interval`` decode steps of about ``batch`` requests."""
        policy = self.policy
        self._look_at_tokens()
        linear, branch, length = self._known()
        choice = choose(self.times, linear, branch, batch, self.strides, self._settled, policy.hysteresis, length, self._yields)
        self.choice = choice
        self._since += 1
        bucket = min(self.times.batches, key=lambda b: abs(b - batch))
        now = self._decisions[bucket] = self._decisions.get(bucket, 0) + 1
        if self._settled is not None:
            self._used[bucket, self.stride] = now
        if self._trial is not None:
            self._trial.left -= 1
            if self._trial.left > 0:
                return self.stride
            self._pay(choice)
        if choice.stride != self._settled and self._may_change(choice, batch):
            self._settled, self._batch, self._since = choice.stride, batch, 0
        elif self._since >= policy.dwell:
            self._trial = self._worth_trying(choice, batch, bucket)
        return self.stride

    def _may_change(self, choice: Choice, batch: int) -> bool:
        if self._settled is None or self._since >= self.policy.dwell:
            return True
        if not self._batch / _OTHER_BATCH < batch < self._batch * _OTHER_BATCH:
            return True
        return choice.expected[choice.stride] > _URGENT * choice.expected[self._settled]

    def _pay(self, choice: Choice) -> None:
        """The trial is over: what it lost against the settled stride is taken from what was saved."""
        trial, self._trial = self._trial, None
        worth = choice.expected[trial.stride] / choice.expected[self._settled]
        self._saved -= trial.seconds * max(0.0, 1 - worth) + self._way_back(choice, trial.stride)

    def _way_back(self, choice: Choice, stride: int) -> float:
        """Seconds that the settled stride loses behind a trial of ``stride``: from 1 its first step is a cold one."""
        return choice.seconds[self._settled] * (1 - 1 / choice.tokens[self._settled]) if stride == 1 else 0.0

    def _worth_trying(self, choice: Choice, batch: int, bucket: int) -> _Trial | None:
        policy, settled, now = self.policy, self._settled, self._decisions[bucket]
        unseen = {n: now - self._used.get((bucket, n), -policy.patience) for n in self.strides if n != settled}
        hoped = {
            n: choice.expected[n] * self.times.seconds(batch, n) / self.times.hoped(batch, n) * (1 + age / policy.patience)
            for n, age in unseen.items()
        }
        if 1 in hoped:
            hoped[1] = max(hoped[1], min(1 + 8 * unseen[1] / policy.patience, policy.doubt))
        n = max(hoped, key=hoped.get, default=settled)
        if hoped.get(n, 0) <= choice.expected[settled]:
            return None
        seconds = policy.interval * policy.trial * self.times.seconds(batch, n)
        least = self.times.seconds(batch, 1) / self.times.seconds(batch, n) / choice.expected[settled]
        if seconds * (1 - least) + self._way_back(choice, n) > (self._saved or 0):
            return None
        return _Trial(n, policy.trial)
