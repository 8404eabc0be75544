"""The embedded checkpoints: a toy I-DLM, a toy AR model with its gated adapter, the scripts that train and measure them.

Importing this package loads nothing heavy; `CHECKPOINT_DIR` and `RISD_BASE_DIR` can be given to any Hugging Face loader, `RISD_ADAPTER_DIR` to `peft`.
"""

from pathlib import Path

CHECKPOINT_DIR = Path(__file__).resolve().parent / "checkpoint"
CHECKPOINT_SHA256 = "e952fd8661237e1efa0801552f175b99c7e28c4d9677d1602925410eed906d63"  # of model.safetensors

# A plain AR base, and the LoRA adapter for its MASK rows (`idlm serve --demo risd`).
RISD_BASE_DIR = Path(__file__).resolve().parent / "risd" / "base"
RISD_ADAPTER_DIR = Path(__file__).resolve().parent / "risd" / "adapter"
