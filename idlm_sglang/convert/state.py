"""What stands in OUT: how it is made (convert.json), the state to go on from (state.pt), and whether it is finished."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from idlm_sglang.config import SettingError
from idlm_sglang.convert.options import Plan

RECORD, STATE = "convert.json", "state.pt"
_FREE = ("out", "data", "device", "save_every", "tflops")  # may differ when a training goes on


def begin(plan: Plan) -> None:
    """Claim OUT for this plan, or find it claimed by the same one; :class:`SettingError` for anything else in its place."""
    record = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(plan).items() if key not in _FREE}
    record |= {"data_sha256": hashlib.sha256(plan.data.read_bytes()).hexdigest(), "finished": False}
    path = plan.out / RECORD
    if not path.is_file():
        if plan.out.exists() and (not plan.out.is_dir() or any(plan.out.iterdir())):
            raise SettingError(f"--out {plan.out} exists and holds something else; allowed: a new or empty directory, or one that idlm convert began")
        plan.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
        return
    try:
        begun = json.loads(path.read_text())
        finished = begun.pop("finished")
    except (ValueError, KeyError, AttributeError):
        raise SettingError(f"--out {plan.out}: its {RECORD} cannot be read; allowed: another directory") from None
    if finished:
        raise SettingError(f"--out {plan.out} holds a finished training; allowed: another directory, or remove it")
    for key, value in begun.items():
        if record.get(key) != value:
            name = "--data" if key == "data_sha256" else "BASE" if key == "base" else f"--{key.replace('_', '-')}"
            now = "another file" if key == "data_sha256" else record.get(key)
            raise SettingError(f"{name} {now}: the training in {plan.out} was begun with {value}; allowed: the same, or another --out")


def finish(plan: Plan) -> None:
    path = plan.out / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": True}, indent=2) + "\n")
    (plan.out / STATE).unlink(missing_ok=True)


def save(plan: Plan, content: dict[str, Any]) -> None:
    """Write the state in one piece: a run that is killed meanwhile leaves the one before."""
    new = plan.out / f"{STATE}.new"
    torch.save(content, new)
    os.replace(new, plan.out / STATE)


def load(plan: Plan) -> dict[str, Any] | None:
    """The state to go on from, on the CPU, or None."""
    path: Path = plan.out / STATE
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None
