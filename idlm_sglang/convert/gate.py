"""The gate of a LoRA adapter: it contributes at the rows that play the MASK role and nowhere else."""

import json
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from idlm_sglang.config import SettingError

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class RowGate:
    """Hooks on every `lora_B` of a model with a PEFT adapter. `rows` says where the adapter contributes: (B, T) bool, or None for every row (stock PEFT).

    A row outside adds zero to the base's output, whatever the adapter holds: its result is the base's, bit for bit.
    """

    def __init__(self, model: torch.nn.Module):
        self.rows: torch.Tensor | None = None
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                for lora_b in layer.lora_B.values():
                    lora_b.register_forward_hook(self._gated)

    def _gated(self, _module, _inputs, output: torch.Tensor) -> torch.Tensor:
        return output if self.rows is None else output.masked_fill(~self.rows[..., None], 0)


def load_adapter(model: torch.nn.Module, directory: Path) -> tuple[RowGate, int]:
    """Put the adapter into the model, in place: its gate, and the MASK id that its adapter_config.json or the model's config names."""
    said = json.loads((directory / "adapter_config.json").read_text()).get("mask_token_id")
    known = getattr(model.config, "mask_token_id", None)
    if said is None and known is None:
        raise SettingError(f"adapter {directory} names no MASK: no mask_token_id in its adapter_config.json, none in the base's config.json")
    if said is not None and known is not None and said != known:
        raise SettingError(f"adapter {directory} says that MASK is token {said}, the base's config.json says {known}; allowed: the adapter of this base")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unexpected keyword arguments")  # mask_token_id, which peft does not know
        PeftModel.from_pretrained(model, str(directory))
    return RowGate(model), known if said is None else said
