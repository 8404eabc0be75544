"""How long decode steps take in service, from the wall clock alone: nothing waits for the device."""

import time
from collections.abc import Callable

_RECENT = 0.1
_SIMILAR = 0.1


class StepClock:
    """Times decode steps by when the next one starts.

    The time from the start of one decode step to that of the next is what a step costs, the scheduler's work included, where
    nothing came between. With the overlap schedule the host runs ahead by a step: that time is the step's before, so both must
    be alike. Where the forward blocks the host (a CPU), a step that something came behind is timed by its forward and
    the work around it that others needed lately.

    Args:
        blocking: the forward has ended when the worker returns.
        now: a clock in seconds.
    """

    def __init__(self, blocking: bool, now: Callable[[], float] = time.perf_counter):
        self._blocking, self._now = blocking, now
        self._steps: list[tuple[int, int]] = []
        self._start, self._inside = 0.0, None
        self._around: float | None = None

    def other(self) -> None:
        """Something that is no decode step starts: an extend."""
        if not self._blocking:
            self._steps.clear()
        self._start = 0.0

    def start(self, batch: int, stride: int) -> tuple[int, int, float] | None:
        """A decode step of ``batch`` requests at ``stride`` starts; what the last one took as (batch, stride, seconds), if known."""
        now, found = self._now(), None
        if self._steps:
            last = self._steps[-1]
            if self._start > 0 and (self._blocking or (len(self._steps) > 1 and _alike(*self._steps))):
                found = (*last, now - self._start)
                if self._inside is not None:
                    around = now - self._start - self._inside
                    self._around = around if self._around is None else self._around + _RECENT * (around - self._around)
            elif self._blocking and self._inside is not None and self._around is not None:
                found = (*last, self._inside + self._around)
        self._steps = [*self._steps[-1:], (batch, stride)]
        self._start, self._inside = now, None
        return found

    def end(self) -> None:
        """The worker is done with the step."""
        if self._blocking:
            self._inside = self._now() - self._start


def _alike(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[1] == other[1] and abs(one[0] - other[0]) <= _SIMILAR * one[0]
