"""Where the scheduler's thread spends a step's time, by the wall clock alone: nothing waits for the device."""

import time
from collections.abc import Callable

# prepare: drafts, rows, KV slots, up to the forward; choose: from its return to the step's result; process: SGLang's work
# on a result: tokens appended, ends found, answers sent; prefill: whole extends, the decode rows and steps in them included.
PREPARE, FORWARD, CHOOSE, PROCESS, PREFILL = PHASES = ("prepare", "forward", "choose", "process", "prefill")


class StepPhases:
    """Sums of host seconds by phase.

    Where the forward blocks the host (a CPU) these are the phases' own times. On a GPU ``prepare``, ``forward`` and ``choose`` are
    the time it takes to launch them, and ``process`` holds the wait for the step's results.

    Attributes:
        seconds: by phase, since start.
        steps: decode steps with a forward of their own; the others came along with a prefill, and are in its time.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.steps = 0
        self._now = now
        self._forward: tuple[float, float] | None = None

    def forward(self, call: Callable, *args, **kwargs):
        """``call(*args, **kwargs)``, the forward of a decode step."""
        start = self._now()
        out = call(*args, **kwargs)
        self._forward = (start, self._now())
        return out

    def decode(self, step: Callable, *args):
        """``step(*args)``, a decode step; one that runs no :meth:`forward` is not counted."""
        self._forward, start = None, self._now()
        result = step(*args)
        end = self._now()
        if self._forward is None:
            return result
        launched, returned = self._forward
        self.steps += 1
        self.seconds[PREPARE] += launched - start
        self.seconds[FORWARD] += returned - launched
        self.seconds[CHOOSE] += end - returned
        return result

    def process(self, call: Callable, *args):
        """``call(*args)``, SGLang's work on a decode step's result."""
        return self.whole(PROCESS, call, *args)

    def whole(self, phase: str, call: Callable, *args):
        """``call(*args)``, all of it in one phase."""
        start = self._now()
        result = call(*args)
        self.seconds[phase] += self._now() - start
        return result
