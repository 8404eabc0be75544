"""Raw results on disk: rows of raw.csv, tokens per forward, and the fingerprint of every run whose rows are still there."""

import csv
import json
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.step_time.options import DEMO, DUMMY, Options
from benchmarks.step_time.parts import PARTS
from idlm_sglang.bench import fingerprint
from idlm_sglang.config import SettingError
from idlm_sglang.demo import CHECKPOINT_DIR

RAW, RUNS = "raw.csv", "fingerprint.json"
_TEXT = ("run", "arm")
_WHOLE = ("batch", "context", "repeat", "steps")
COLUMNS = (*_TEXT, *_WHOLE, "width", "mean_context", "elsewhere", "wall_ms", *(f"{part}_ms" for part in PARTS))


def new_run(options: Options, command: str) -> dict:
    """The fingerprint of a run that begins now."""
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items() if name not in ("out", "render")}
    model = {DEMO: CHECKPOINT_DIR, DUMMY: None}.get(options.model, Path(options.model))
    return {
        "id": time.strftime("%Y%m%dT%H%M%S"),
        "command": command,
        "options": asked,
        "checkpoint": None if model is None else fingerprint.checkpoint(model),
        **fingerprint.machine(),
    }


def read(folder: Path) -> dict:
    """``{"rows": [...], "runs": [...], "tpf": {stride: {...}}}`` of a results folder. Raises SettingError where there is none."""
    if not (folder / RAW).is_file():
        raise SettingError(f"--out {folder} holds no {RAW}; allowed: a folder that was measured into")
    with (folder / RAW).open(newline="") as file:
        rows = [{k: v if k in _TEXT else int(v) if k in _WHOLE else float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    kept = json.loads((folder / RUNS).read_text())
    return {"rows": rows, "runs": kept["runs"], "tpf": {int(stride): found for stride, found in kept["tpf"].items()}}


def add(folder: Path, run: dict, rows: list[dict], tpf: dict[int, dict]) -> None:
    """Keep rows of a run; they replace older runs' of the same batch and context, all arms, so that arms compared ran together."""
    folder.mkdir(parents=True, exist_ok=True)
    old = read(folder) if (folder / RAW).is_file() else {"rows": [], "runs": [], "tpf": {}}
    points = {(row["batch"], row["context"]) for row in rows}
    rows = [row for row in old["rows"] if row["run"] == run["id"] or (row["batch"], row["context"]) not in points] + rows
    rows.sort(key=lambda row: (row["context"], row["batch"], row["arm"] != "AR", len(row["arm"]), row["arm"], row["repeat"]))
    with (folder / RAW).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    used = {row["run"] for row in rows}
    runs = [r for r in old["runs"] if r["id"] in used and r["id"] != run["id"]] + [run]
    (folder / RUNS).write_text(json.dumps({"runs": runs, "tpf": old["tpf"] | tpf}, indent=1) + "\n")
