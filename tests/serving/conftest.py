"""One process that has loaded SGLang answers for all tests that need it: loading takes most of their time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from idlm_sglang.demo import CHECKPOINT_DIR

from .refusals import CASES


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """The embedded checkpoint, and copies of its configuration with one thing wrong. No weights: none are loaded."""
    made = {"demo": str(CHECKPOINT_DIR)}

    def make(name: str, changes: dict, without: tuple[str, ...] = (), mask: str = "<|MASK|>") -> None:
        where = tmp_path_factory.mktemp(name)
        for file in CHECKPOINT_DIR.glob("*.json"):
            shutil.copy(file, where)
        config = json.loads((where / "config.json").read_text()) | changes
        (where / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in without}))
        for file in where.glob("tokenizer*.json"):
            file.write_text(file.read_text().replace("<|MASK|>", mask))
        tokenizer = json.loads((where / "tokenizer_config.json").read_text())
        if mask != "<|MASK|>":
            tokenizer.pop("mask_token", None)
        (where / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        made[name] = str(where)

    make("without_mask", {}, without=("mask_token_id",), mask="<|none|>")
    make("mask_outside", {"mask_token_id": 5000})
    make("published", {"architectures": ["SDARForCausalLM"], "model_type": "sdar"})
    make("llama", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    return made


@pytest.fixture(scope="session")
def sglang_says(checkpoints) -> dict:
    """What `resolving.py` reports."""
    cases = [
        {
            "argv": ["--model-path", checkpoints.get(case.model, case.model), "--speculative-algorithm", "ISD", *case.argv],
            "environ": case.environ,
            "stock": case.stock,
        }
        for case in CASES
    ]
    describe = {
        "isd": ["--model-path", checkpoints["demo"], "--speculative-algorithm", "ISD", "--dtype", "float32"],
        "ar": ["--model-path", checkpoints["demo"], "--max-running-requests", "64"],
        "published": ["--model-path", checkpoints["published"], "--speculative-algorithm", "ISD"],
    }
    asked = {"cases": cases, "check": ["127.0.0.1", "0"], "describe": describe}
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.resolving"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)
