"""The stride controller inside the engine: what it is told, when it decides, and that all ranks do the same."""

import torch

from idlm_sglang.engine.clock import StepClock
from idlm_sglang.isd.stride import StepTimes, StrideController

_RECENT = 0.2


class StrideControl:
    """Feeds :class:`~idlm_sglang.isd.stride.StrideController` and asks it every some decode steps.

    Times and acceptance are the first tensor-parallel rank's; its decision is broadcast on the host at fixed step counts, which
    all ranks reach alike: ranks that timed for themselves would come to different strides and hang.

    Args:
        times: measured at start-up, on the first rank.
        strides: what to choose from.
        blocking: the forward has ended when the worker returns (a CPU).
        group: SGLang's tensor-parallel group.
        totals: this process's counts (``IsdMetrics.totals``), None on ranks that do not count.
        salvage: rounds behind a rejection carry drafts that survived it.
    """

    def __init__(self, times: StepTimes, strides: tuple[int, ...], blocking: bool, group, totals, salvage: bool):
        self._controller = StrideController(times, strides, salvage)
        self._clock = StepClock(blocking)
        self._group, self._totals = group, totals
        self._steps, self._told = 0, (0, 0, 0)
        self._tokens_per_round = self._speed = None

    def rounds(self, seen: list[tuple[int, int, bool]], committed: tuple[int, int, int] | None) -> None:
        """One step, as it reaches the host.

        Args:
            seen: of each request drafts verified, accepted, and whether they were survivors.
            committed: the stride of the requests without one of their own, the tokens that these committed, and their number; None: there were none.
        """
        if committed is not None:
            self._controller.observe_tokens(*committed)
        for survivors in (False, True):
            tried = [(count, run) for count, run, salvaged in seen if count and salvaged == survivors]
            if tried:
                self._controller.observe_rounds(*zip(*tried), survivors)

    def other(self) -> None:
        """Something starts that is no step of the controller's."""
        self._clock.other()

    def start(self, batch: int, stride: int) -> None:
        """A decode step starts."""
        found = self._clock.start(batch, stride)
        if found is None or self._totals is None:
            return
        self._controller.observe_step(*found)
        size, _, seconds = found
        self._speed = _recent(self._speed, self._controller.times.seconds(size, 1) / seconds)

    def end(self) -> None:
        """The worker is done with the step that was started last."""
        self._clock.end()

    def decide(self, batch: int) -> int | None:
        """After a decode step of ``batch`` requests, timed or not: the stride of the next ones where it is time to decide."""
        self._steps += 1
        if self._steps % self._controller.policy.interval:
            return None
        if self._totals is None:
            return agreed(self._group, 0)
        now = (self._totals.tokens, sum(self._totals.rounds.values()), self._totals.answers)
        tokens, rounds, answers = (a - b for a, b in zip(now, self._told))
        if rounds:
            self._controller.observe_answers(tokens, answers)
            self._told, self._tokens_per_round = now, _recent(self._tokens_per_round, tokens / rounds)
        return agreed(self._group, self._controller.decide(batch))

    def gains(self) -> tuple[float | None, float | None]:
        """Tokens per second over those of stride 1 under the same load: as expected of the stride in use, and as it turned out lately."""
        choice = self._controller.choice
        expected = None if choice is None else choice.expected[self._controller.stride]
        known = self._tokens_per_round is not None and self._speed is not None
        return expected, self._tokens_per_round * self._speed if known else None

    def as_dict(self) -> dict:
        """For ``/server_info``."""
        expected, actual = self.gains()
        choice = self._controller.choice
        return {
            "expected_gain": expected,
            "actual_gain": actual,
            "expected_by_stride": None if choice is None else {str(n): round(gain, 3) for n, gain in choice.expected.items()},
            "tokens_per_round_by_stride": None if choice is None else {str(n): round(tokens, 2) for n, tokens in choice.tokens.items()},
            "step_ms_by_stride": None if choice is None else {str(n): round(1e3 * seconds, 2) for n, seconds in choice.seconds.items()},
            "acceptance": [round(p, 4) for p in self._controller.acceptance.linear()],
            "on_trial": self._controller.on_trial,
        }


def agreed(group, value: int) -> int:
    """The first rank's ``value`` on every rank of SGLang's ``group``: one broadcast between hosts, none for a single rank."""
    if group.world_size == 1:
        return value
    shared = torch.tensor([value], dtype=torch.int64)
    torch.distributed.broadcast(shared, src=group.ranks[0], group=group.cpu_group)
    return int(shared)


def _recent(before: float | None, now: float) -> float:
    return now if before is None else before + _RECENT * (now - before)
