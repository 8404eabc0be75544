"""The gate of a LoRA adapter: it contributes at the rows that play the MASK role and nowhere else."""

import torch
from peft.tuners.lora import LoraLayer

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
