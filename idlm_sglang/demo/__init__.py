"""The embedded checkpoints: a toy I-DLM, a toy AR model with its gated adapter, the scripts that train and measure them.

Importing this package loads nothing heavy; `CHECKPOINT_DIR` and `RISD_BASE_DIR` can be given to any Hugging Face loader, `RISD_ADAPTER_DIR` to `peft`.
"""

from pathlib import Path

CHECKPOINT_DIR = Path(__file__).resolve().parent / "checkpoint"
CHECKPOINT_SHA256 = "76232f25ef050aaeee7c5312ad9e3079f27ac7d3f1783a8568bbaee70564c488"  # of model.safetensors

# A plain AR base, and the LoRA adapter for its MASK rows (`idlm serve --demo risd`).
RISD_BASE_DIR = Path(__file__).resolve().parent / "risd" / "base"
RISD_ADAPTER_DIR = Path(__file__).resolve().parent / "risd" / "adapter"
