"""One process that has loaded SGLang answers for all tests that need it: loading takes most of their time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from idlm_sglang.demo import CHECKPOINT_DIR

from tests.adapters import key, write_adapter

from .refusals import CASES


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """The embedded checkpoint, and copies of it with one thing wrong."""
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
        (where / "model.safetensors").symlink_to(CHECKPOINT_DIR / "model.safetensors")
        made[name] = str(where)

    make("without_mask", {}, without=("mask_token_id",), mask="<|none|>")
    make("mask_outside", {"mask_token_id": 5000})
    make("published", {"architectures": ["SDARForCausalLM"], "model_type": "sdar"})
    make("llama", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    for name in ("cut_off", "without_weights", "without_a_shard", "without_an_index"):
        make(name, {})
        (Path(made[name]) / "model.safetensors").unlink()
    (Path(made["cut_off"]) / "model.safetensors").write_bytes((CHECKPOINT_DIR / "model.safetensors").read_bytes()[:-1000])
    (Path(made["without_an_index"]) / "model.safetensors.index.json").write_text("version https://git-lfs.github.com/spec/v1")
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (Path(made["without_a_shard"]) / "model.safetensors.index.json").write_text(json.dumps(index))
    made["adapter"] = write_adapter(tmp_path_factory.mktemp("a"), CHECKPOINT_DIR)
    made["mask_4_adapter"] = write_adapter(tmp_path_factory.mktemp("a"), CHECKPOINT_DIR, mask_token_id=4)
    made["maskless_adapter"] = write_adapter(tmp_path_factory.mktemp("a"), CHECKPOINT_DIR, mask_token_id=None)
    made["nan_adapter"] = write_adapter(tmp_path_factory.mktemp("a"), CHECKPOINT_DIR, change=lambda w: w[key(1, "v_proj", "B")].fill_(float("nan")))
    made["deeper_adapter"] = write_adapter(tmp_path_factory.mktemp("a"), CHECKPOINT_DIR, change=lambda w: w.update({key(9, "v_proj", "A"): torch.zeros(2, 256)}))
    return made


@pytest.fixture(scope="session")
def sglang_says(checkpoints) -> dict:
    """What `resolving.py` reports."""
    cases = [
        {
            "argv": ["--model-path", checkpoints.get(case.model, case.model), "--speculative-algorithm", "ISD", *case.argv],
            "environ": {name: checkpoints.get(value, value) for name, value in case.environ.items()},
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
