"""LoRA adapters in PEFT's format, of random numbers, made to fit a checkpoint or not to."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from idlm_sglang.adapter import CONFIG_FILE, MODULES, WEIGHTS_FILE, module_shapes

Weights = dict[str, torch.Tensor]


def key(layer: int, module: str, side: str) -> str:
    """Name of a tensor as PEFT writes it; side is A or B."""
    return f"base_model.model.model.layers.{layer}.{MODULES[module]}.lora_{side}.weight"


def write_adapter(at: Path, base: Path, rank: int = 2, scale: float = 0.02, change: Callable[[Weights], object] | None = None, **config) -> str:
    """An adapter for the checkpoint ``base`` in the directory ``at``; ``change`` edits its tensors, ``config`` its configuration (None drops a key)."""
    sizes = SimpleNamespace(**json.loads((base / "config.json").read_text()))
    g = torch.Generator().manual_seed(0)
    weights: Weights = {}
    for layer in range(sizes.num_hidden_layers):
        for module, (out, inside) in module_shapes(sizes).items():
            weights[key(layer, module, "A")] = torch.randn(rank, inside, generator=g) / inside**0.5
            weights[key(layer, module, "B")] = torch.randn(out, rank, generator=g) * scale
    if change is not None:
        change(weights)
    at.mkdir(parents=True, exist_ok=True)
    save_file(weights, at / WEIGHTS_FILE)
    written = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(MODULES), "bias": "none", "mask_token_id": 3} | config
    (at / CONFIG_FILE).write_text(json.dumps({name: value for name, value in written.items() if value is not None}))
    return str(at)
