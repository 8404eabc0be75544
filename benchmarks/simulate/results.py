"""Results on disk: what was predicted, left out and checked, each in a CSV of its own; and the options they came from."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.simulate.bench_results import Single
from benchmarks.simulate.fit import LeftOut
from benchmarks.simulate.predict import Predicted
from benchmarks.simulate.published import Measured
from benchmarks.simulate.roofline import Overheads
from benchmarks.simulate.validate import Checked
from idlm_sglang.config import SettingError

_TABLES = {"predictions.csv": Predicted, "checked.csv": Checked}
_INPUTS, _LEFT_OUT = "inputs.json", "leave_one_out.csv"


@dataclass(frozen=True)
class Results:
    """Everything that a report and its plots show.

    Attributes:
        single: cost of stride 1; bench, step_time: folders it and the check came from; command: as typed.
    """

    overheads: Overheads
    single: Single
    command: str
    bench: str
    step_time: str
    left_out: list[LeftOut]
    checked: list[Checked]
    predicted: list[Predicted]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in zip(_TABLES, (self.predicted, self.checked)):
            _write(folder / name, [asdict(row) for row in rows])
        _write(folder / _LEFT_OUT, [{**asdict(x.point), "predicted": x.predicted, "published": x.published, "error": x.error} for x in self.left_out])
        inputs = {"command": self.command, "bench": self.bench, "step_time": self.step_time, "overheads": asdict(self.overheads), "single": asdict(self.single)}
        (folder / _INPUTS).write_text(json.dumps(inputs, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """Raises SettingError where there is nothing to read."""
        if not (folder / _INPUTS).is_file():
            raise SettingError(f"--out {folder} holds no {_INPUTS}; allowed: a folder that was simulated into")
        told = json.loads((folder / _INPUTS).read_text())
        predicted, checked = ([_typed(row, kind) for row in _read(folder / name)] for name, kind in _TABLES.items())
        left_out = [LeftOut(_typed(row, Measured), float(row["predicted"]), float(row["published"])) for row in _read(folder / _LEFT_OUT)]
        return cls(Overheads(**told["overheads"]), Single(**told["single"]), told["command"], told["bench"], told["step_time"], left_out, checked, predicted)


def _write(path: Path, rows: Sequence[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def _read(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _typed(row: dict, kind: type):
    """A row as its dataclass; an empty cell of a field that may be None is None."""
    values = {}
    for f in fields(kind):
        text, optional = row[f.name], "None" in str(f.type)
        number = int if "int" in str(f.type) else float if "float" in str(f.type) else str
        values[f.name] = None if optional and text == "" else number(text)
    return kind(**values)
