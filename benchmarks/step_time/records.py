"""The lines a server's :class:`~benchmarks.step_time.ranges.Recorder` wrote, and the steady decode steps among them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.step_time.parts import PARTS


@dataclass(frozen=True)
class Step:
    """One scheduler step.

    Attributes:
        begin: nanoseconds on the server's clock.
        decode: not an extend.
        requests: running requests of its batch; rows: of its forward, all requests together.
        columns: committed columns of all requests; -1 where the host does not know.
        parts: nanoseconds by part, in the order of PARTS.
    """

    begin: int
    decode: bool
    requests: int
    rows: int
    columns: int
    parts: tuple[int, ...]

    @property
    def wall(self) -> int:
        """Nanoseconds from its begin to the next step's."""
        return sum(self.parts)


@dataclass(frozen=True)
class Window:
    """Steady decode steps of one run: means over ``steps`` of them.

    Attributes:
        wall: milliseconds a step; parts: milliseconds by part, which add up to it.
        width: rows per request; context: committed columns per request (NaN: unknown).
    """

    steps: int
    wall: float
    parts: dict[str, float]
    width: float
    context: float


class Records:
    """Reads a growing file of records from where it last stopped."""

    def __init__(self, path: Path):
        self.path, self._read = path, 0

    def new(self) -> list[Step]:
        """Steps finished since the last call. The step running now is not among them."""
        if not self.path.exists():
            return []
        with self.path.open() as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._read += len(whole.encode())
        return [parse(line) for line in whole.splitlines()]


def parse(line: str) -> Step:
    """One line of a file of records."""
    begin, decode, requests, rows, columns, *parts = map(int, line.split(","))
    assert len(parts) == len(PARTS), line
    return Step(begin, bool(decode), requests, rows, columns, tuple(parts))


def steady(steps: Sequence[Step], batch: int, low: float, high: float) -> list[Step]:
    """The decode steps of a full batch whose mean context lies in low..high, and that another such decode step follows
    (so that no prefill, wait or smaller batch is inside their wall time)."""
    found = []
    for step, after in zip(steps, steps[1:]):
        full = step.decode and after.decode and step.requests == after.requests == batch
        in_place = step.columns < 0 or low <= step.columns / batch <= high
        if full and in_place and after.begin - step.begin == step.wall:
            found.append(step)
    return found


def window(steps: Sequence[Step]) -> Window:
    """Means over steady steps."""
    count = len(steps)
    parts = {part: sum(step.parts[i] for step in steps) / count / 1e6 for i, part in enumerate(PARTS)}
    known = [step.columns / step.requests for step in steps if step.columns >= 0]
    return Window(
        steps=count,
        wall=sum(step.wall for step in steps) / count / 1e6,
        parts=parts,
        width=sum(step.rows / step.requests for step in steps) / count,
        context=sum(known) / len(known) if known else float("nan"),
    )
