"""A long start, told as it happens: SGLang's log read for its stages, one updating line or one line every ten seconds."""

import re
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

QUIET_INTERVAL = 10.0  # seconds between lines where the line cannot be updated in place

# What a line of the log says about how far the start has come. Later entries win over earlier ones.
_STAGES: tuple[tuple[str, str], ...] = (
    (r"server_args=", "starting the worker processes"),
    (r"Init (torch distributed|parallel) begin", "setting up the workers"),
    (r"(Downloading|Fetching) .*?(\d+%)", "downloading the checkpoint"),
    (r"Load weight begin", "loading the weights"),
    (r"(?:loading|Loading) .*?shards:\s+(\d+%)", "loading the weights"),
    (r"Load weight end", "allocating memory"),
    (r"KV Cache is allocated", "preparing to decode"),
    (r"Capture .*graph.* begin|Capturing batches", "capturing CUDA graphs"),
    (r"Started server process", "opening the port"),
    (r"Application startup complete", "warming up with a first request"),
)
_COMPILED = tuple((re.compile(pattern), stage) for pattern, stage in _STAGES)
_PERCENT = re.compile(r"\d+%")
_TIMESTAMP = re.compile(r"^\[[^]]*\] ")

# The line that explains a failure, best kind first: our own refusal (an uncaught SettingError), the end of a
# traceback, a worker that died without one, anything that speaks of an error. The first two stand at the margin,
# where log lines have a timestamp. SGLang passes over models it cannot import, and says so each time.
_REASONS = (
    re.compile(r"idlm: "),
    re.compile(r"(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Exit|Interrupt)(?:: |$)"),
    re.compile(r".*(?:crashed with exit code|is dead)"),
    re.compile(r"(?!.*Ignore import error).*error", re.IGNORECASE),
)
# uvicorn's words where another program took the port since it was looked at. SGLang then waits two minutes for an answer before it ends.
_PORT_TAKEN = re.compile(r".*error while attempting to bind on address")
_KEPT_LINES = 400  # what is older explains no end


class LogReader:
    """Follows a log given in pieces: the stage it has reached, and the line that explains a failure."""

    def __init__(self) -> None:
        self.stage = "loading SGLang"
        self.port_taken = False
        self._starting = True
        self._rest = ""
        self._recent: deque[str] = deque(maxlen=_KEPT_LINES)

    def started(self) -> None:
        """The server answers: from now on lines are kept for :meth:`failure` alone. A busy server logs several a request."""
        self._starting = False

    def feed(self, piece: bytes) -> None:
        """Read on. Progress bars end their lines with a carriage return."""
        lines = (self._rest + piece.decode("utf-8", "replace")).replace("\r", "\n").split("\n")
        self._rest = lines.pop()
        for line in lines:
            self._read(line)

    def _read(self, line: str) -> None:
        if not line.strip():
            return
        self._recent.append(line)
        if not self._starting:
            return
        self.port_taken |= _PORT_TAKEN.match(line) is not None
        for pattern, stage in _COMPILED:
            if pattern.search(line):
                percent = _PERCENT.search(line)
                self.stage = f"{stage} {percent.group()}" if percent else stage

    def failure(self) -> str | None:
        """The line of the log that says best why the server ended, None where none does."""
        if self._rest:
            self._read(self._rest)
            self._rest = ""
        for reason in _REASONS:
            for line in reversed(self._recent):
                if reason.match(line):
                    return _TIMESTAMP.sub("", line).strip()
        return None


class Display:
    """Shows the stage and the time since the start until `done`.

    On a terminal one line is rewritten; elsewhere a line appears every ten seconds. `live=False` keeps a terminal
    still, for when the log itself is shown there.
    """

    def __init__(self, out: TextIO, live: bool | None = None, clock: Callable[[], float] = time.monotonic):
        self._out = out
        self._clock = clock
        self._terminal = out.isatty()
        self._live = self._terminal if live is None else live and self._terminal
        self._start = clock()
        self._last = self._start
        self._drawn = 0

    @property
    def elapsed(self) -> float:
        return self._clock() - self._start

    def update(self, stage: str) -> None:
        if self._live:
            line = f"  {self.elapsed:4.0f} s  {stage} ..."
            self._out.write("\r" + line.ljust(self._drawn))
            self._drawn = len(line)
        elif not self._terminal and self._clock() - self._last >= QUIET_INTERVAL:
            self._last = self._clock()
            self._out.write(f"idlm: {self.elapsed:.0f} s, {stage}\n")
        self._out.flush()

    def say(self, text: str) -> None:
        """Print lines of their own; the updating line makes room."""
        self.clear()
        self._out.write(text + "\n")
        self._out.flush()

    def clear(self) -> None:
        """Take the updating line away."""
        if self._drawn:
            self._out.write("\r" + " " * self._drawn + "\r")
            self._drawn = 0
        self._out.flush()
