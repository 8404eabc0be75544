"""What a part of the comparison found, ready for the terminal and for the reports."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Table:
    """A table of a report."""

    title: str
    heads: tuple[str, ...]
    rows: list[list[Any]]


@dataclass
class Finding:
    """One part of the verdict.

    Attributes:
        name: greedy, seeded, sampled, score, fields, errors or speed.
        passed: False where it speaks against parity; None where it was not judged.
        line: the figures in one line.
        tables: what a report shows beneath.
        notes: how to read it.
    """

    name: str
    passed: bool | None
    line: str
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def word(self) -> str:
        return {True: "ok", False: "FAIL", None: "-"}[self.passed]
