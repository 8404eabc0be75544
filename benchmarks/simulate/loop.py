"""A closed loop: slots of a server, each with one request at a time, the next as soon as it ends.

Assumed of the scheduler, as SGLang's default: waiting prompts are prefilled together before the next decode step, and everyone waits meanwhile; all running
requests take part in every decode step; a prompt's first token comes from its prefill; behind it a request has no drafts (or some, where first steps are warm).
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from benchmarks.simulate.chain import Acceptance, Drafts, Round, advance
from benchmarks.simulate.workload import Workload

_MANY = 99  # more drafts than any stride keeps


class Times(Protocol):
    """Seconds, arrays with one entry per set-up (see `roofline.Roofline`)."""

    def decode(self, stride: np.ndarray, running: np.ndarray, columns: np.ndarray) -> np.ndarray: ...
    def prefill(self, requests: np.ndarray, tokens: np.ndarray) -> np.ndarray: ...


class Policy(Protocol):
    """Chooses the stride of every set-up's next step."""

    def strides(self, running: np.ndarray) -> np.ndarray:
        """N per set-up, 0 for AR; running: requests, 0 where the set-up has finished."""

    def observe(self, running: np.ndarray, stride: np.ndarray, seconds: np.ndarray, done: Round, active: np.ndarray) -> None:
        """What the step was: its time, and the round of the slots that are ``active``."""


@dataclass
class Fixed:
    """One stride throughout, 0 for AR."""

    stride: int

    def strides(self, running: np.ndarray) -> np.ndarray:
        return np.full(len(running), self.stride)

    def observe(self, *step) -> None:
        pass


@dataclass(frozen=True)
class Load:
    """Requests of every set-up, shape (set-ups, requests). The first ``slots`` of them run from the start.

    Attributes:
        lengths: tokens of the answers. prompt: tokens of every prompt.
        slots: requests that run at a time, per set-up.
        ages: tokens that the first requests have already behind them, shape (set-ups, slots), where the server has been busy for long; None: all arrive at once.
    """

    lengths: np.ndarray
    prompt: int
    slots: np.ndarray
    ages: np.ndarray | None = None

    @classmethod
    def busy(cls, workload: Workload, slots: np.ndarray, waves: int, seed: int) -> "Load":
        """A server that has been busy for long, and ``waves`` further requests for each slot."""
        random = np.random.default_rng(seed)
        most = int(slots.max())
        # Every set-up gets the same requests, so that arms and set-ups differ in nothing else.
        first, ages = workload.running(random, (1, most))
        rest = workload.lengths(random, (1, most * waves))
        shape = (len(slots), 1)
        return cls(np.tile(np.concatenate([first, rest], 1), shape), workload.prompt, np.asarray(slots), np.tile(ages, shape))


@dataclass(frozen=True)
class Outcome:
    """Per set-up.

    Attributes:
        steady: tokens per second until no request waits any more.
        total: tokens per second from the start to the end of the last answer, the draining batch included.
        per_round: tokens committed per request and decode step.
        used: share of the requests' rounds by stride.
    """

    steady: np.ndarray
    total: np.ndarray
    per_round: np.ndarray
    used: dict[int, np.ndarray] = field(default_factory=dict)


def run(times: Times, policy: Policy, acceptance: Acceptance, load: Load, seed: int, warm: bool = False) -> Outcome:
    """Serve all requests of ``load``. Arms that are compared take the same seed. warm: a prefill leaves drafts behind, as a decode step does."""
    random = np.random.default_rng(seed)
    setups, asked = len(load.slots), np.minimum(load.lengths.shape[1], load.slots * (load.lengths.shape[1] // int(load.slots.max())))
    shape = (setups, int(load.slots.max()))
    exists = np.arange(shape[1]) < load.slots[:, None]
    left, columns, drafts = np.zeros(shape, np.int64), np.zeros(shape, np.int64), Drafts.none(shape)
    clock, tokens, rounds, committed = (np.zeros(setups) for _ in range(4))
    steady_clock, steady_tokens = np.zeros(setups), np.zeros(setups)
    given = np.zeros(setups, np.int64)
    used: dict[int, np.ndarray] = {}
    if load.ages is not None:
        left = np.where(exists, load.lengths[:, : shape[1]] - load.ages, 0)
        columns = np.where(exists, load.prompt + load.ages, 0)
        given = load.slots.copy()
        # Like any request that decodes, these have the drafts of their last step.
        drafts.linear += _MANY
    while True:
        if (given < asked).any():
            free = exists & (left == 0)
            order = np.cumsum(free, 1) - 1 + given[:, None]
            taken = free & (order < asked[:, None])
            new = taken.sum(1)
            if new.any():
                clock += np.where(new > 0, times.prefill(new, new * load.prompt), 0)
                lengths = np.take_along_axis(load.lengths, np.minimum(order, load.lengths.shape[1] - 1).clip(0), 1)
                left = np.where(taken, lengths - 1, left)
                columns = np.where(taken, load.prompt + 1, columns)
                drafts.linear[taken], drafts.survivors[taken] = _MANY if warm else 0, 0
                tokens += new
                given += new
            waiting = given < asked
            # Where nothing waits any more the steady part has ended, with the first answer that was not followed by another.
            ended = ~waiting & (steady_clock == 0)
            steady_clock, steady_tokens = np.where(ended, clock, steady_clock), np.where(ended, tokens, steady_tokens)
        active = left > 0
        running = active.sum(1)
        if not running.any():
            if (given >= asked).all():
                break
            continue
        stride = policy.strides(running)
        seconds = np.where(running > 0, times.decode(stride, running, (columns * active).sum(1)), 0)
        done = advance(drafts, np.maximum(stride, 1)[:, None], random.random(shape), acceptance)
        policy.observe(running, stride, seconds, done, active)
        gained = np.where(active, np.minimum(done.accepted + 1, left), 0)
        left -= gained
        columns += gained
        step = gained.sum(1)
        clock += seconds
        tokens += step
        committed += step
        rounds += running
        for n in np.unique(stride):
            used.setdefault(int(n), np.zeros(setups))
            used[int(n)] += np.where(stride == n, running, 0)
    # Where nothing ever waited there is no steady part to tell apart.
    steady = np.divide(steady_tokens, steady_clock, out=tokens / clock, where=steady_clock > 0)
    return Outcome(steady, tokens / clock, committed / rounds, {n: count / rounds for n, count in sorted(used.items())})
