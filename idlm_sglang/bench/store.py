"""Raw results as JSONL: a first line that says what was measured on what, then one line a point. Continued after a break."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from idlm_sglang.bench.load import Point
from idlm_sglang.config import SettingError

FILE = "raw.jsonl"


class Store:
    """The raw results in one directory.

    A directory belongs to one plan: the first line holds it, and what is added later must be of the same plan. The
    ``fingerprint`` (versions, device, servers) of each start stands in front of the points measured under it. ``results`` are
    those under load, ``batches`` those of `--one-batch`.
    """

    def __init__(self, directory: Path):
        """Raises :class:`SettingError` for a file that is none of `idlm bench`'s."""
        self.path = directory / FILE
        self.plan: dict[str, Any] | None = None
        self.fingerprints: list[dict[str, Any]] = []
        self.results: dict[Point, dict[str, Any]] = {}
        self.batches: dict[Point, dict[str, Any]] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        text = self.path.read_text()
        whole, _, torn = text.rpartition("\n")
        if torn:  # a break in the middle of a line
            self.path.write_text(whole + "\n" if whole else "")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                if "plan" in row:
                    self.plan = row["plan"]
                elif "fingerprint" in row:
                    self.fingerprints.append(row["fingerprint"])
                elif "one_batch" in row:
                    self.batches[Point(**row.pop("one_batch"))] = row
                else:
                    self.results[Point(**row.pop("point"))] = row
            except (ValueError, KeyError, TypeError, AttributeError):
                raise SettingError(f"{self.path} line {number} is no result of `idlm bench`; allowed: another --out") from None

    def begin(self, plan: dict[str, Any]) -> None:
        """Open for adding. Raises :class:`SettingError` where the directory holds another plan's results, or cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.plan is None:
                self._add({"plan": plan})
                self.plan = plan
        except OSError as error:
            raise SettingError(f"--out {self.path.parent} cannot be written ({error.strerror}); allowed: a directory") from None
        if self.plan != plan:
            changed = sorted(key for key in {*plan, *self.plan} if plan.get(key) != self.plan.get(key))
            raise SettingError(f"--out {self.path.parent} holds another comparison ({', '.join(changed)} differ); allowed: the same command, or another --out")

    def drop_incomplete(self, arms: list[str]) -> None:
        """Forget points of a load whose repeat was not measured for every arm: a ratio pairs what was measured in turn."""
        for measured in (self.results, self.batches):
            for point in list(measured):
                twins = [replace(point, arm=arm) for arm in arms]
                if not all(twin in measured for twin in twins):
                    del measured[point]

    def told(self, fingerprint: dict[str, Any]) -> None:
        """Versions, device and servers of the points that follow."""
        self._add({"fingerprint": fingerprint})
        self.fingerprints.append(fingerprint)

    def add(self, point: Point, result: dict[str, Any]) -> None:
        """One more point, on disk when this returns."""
        self._add({"point": asdict(point), **result})
        self.results[point] = result

    def add_batches(self, point: Point, result: dict[str, Any]) -> None:
        """The static batches of one more point, on disk when this returns."""
        self._add({"one_batch": asdict(point), **result})
        self.batches[point] = result

    def _add(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
