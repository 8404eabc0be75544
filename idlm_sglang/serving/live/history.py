"""The last minutes of the ``idlm`` counters, kept by the HTTP process for whoever opens the page."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

logger = logging.getLogger(__name__)

KEPT = 300.0  # seconds
_WATCHED, _UNWATCHED = 2.0, 10.0  # seconds between samples, with and without somebody looking
_STILL_WATCHED = 10.0  # seconds since a page asked last

_SUMS = ("tokens_committed", "forwards", "timed_steps", "running", "queued")
_BY_POSITION = ("drafts_proposed", "drafts_accepted", "salvage_proposed", "salvage_accepted")
_BY_NAME = ("rounds", "step_seconds", "steps_by_stride")


def sample(states: list[dict], now: float) -> dict:
    """One sample of the counters of all data-parallel replicas together.

    Args:
        states: SGLang's internal state of each; what has no ``idlm`` is left out.
        now: seconds since the epoch.
    """
    found = [state["idlm"] for state in states if "idlm" in state]
    out: dict = {"time": round(now, 3), "replicas": len(found)}
    out |= {name: sum(s[name] for s in found) for name in _SUMS}
    for name in _BY_POSITION:
        out[name] = [sum(column) for column in zip(*(s[name] for s in found))]
    for name in _BY_NAME:
        keys = dict.fromkeys(key for s in found for key in s[name])
        out[name] = {key: sum(s[name].get(key, 0) for s in found) for key in keys}
    out["strides"] = sorted({s["stride"] for s in found})
    out["max_stride"] = max((s["max_stride"] for s in found), default=1)
    out["auto"] = any(s["auto"] for s in found)
    return out


class History:
    """Samples the replicas' counters, more often while somebody looks.

    Args:
        read: SGLang's internal states, one of each replica.
    """

    def __init__(self, read: Callable[[], Awaitable[list[dict]]], now: Callable[[], float] = time.time):
        self._read, self._now = read, now
        self._samples: deque[dict] = deque()
        self._task: asyncio.Task | None = None
        self._looked = 0.0
        self._look = asyncio.Event()
        self.started = now()

    def start(self) -> None:
        """Begin, in the event loop that runs; a second call does nothing."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            try:
                self.keep(sample(await self._read(), self._now()))
            except Exception:
                logger.exception("idlm: the live page's figures could not be read")
            if self._now() - self._looked < _STILL_WATCHED:
                await asyncio.sleep(_WATCHED)
                continue
            self._look.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), _UNWATCHED)

    def keep(self, one: dict) -> None:
        """Add a sample, drop what is too old."""
        self._samples.append(one)
        while one["time"] - self._samples[0]["time"] > KEPT:
            self._samples.popleft()

    def since(self, then: float) -> list[dict]:
        """Samples behind ``then`` (seconds since the epoch); whoever asks is looking."""
        self._looked = self._now()
        self._look.set()
        return [one for one in self._samples if one["time"] > then]
