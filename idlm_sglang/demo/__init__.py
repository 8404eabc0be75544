"""The embedded checkpoints: a toy I-DLM, a toy AR model with its gated adapter, the scripts that train and measure them.

Importing this package loads nothing heavy; `CHECKPOINT_DIR` and `RISD_BASE_DIR` can be given to any Hugging Face loader, `RISD_ADAPTER_DIR` to `peft`.
"""

from pathlib import Path

CHECKPOINT_DIR = Path(__file__).resolve().parent / "checkpoint"
CHECKPOINT_SHA256 = "66b103b2f62d76e06de88a9ca29896c4e7bd6f3d8e29bf4746286e8c0b1dcba1"  # of model.safetensors

# A plain AR base, and the LoRA adapter for its MASK rows (`idlm serve --demo risd`).
RISD_BASE_DIR = Path(__file__).resolve().parent / "risd" / "base"
RISD_ADAPTER_DIR = Path(__file__).resolve().parent / "risd" / "adapter"
