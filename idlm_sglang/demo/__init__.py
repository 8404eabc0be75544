"""The embedded checkpoint: a toy I-DLM, the script that trains it and the one that measures it.

Importing this package loads nothing heavy; `CHECKPOINT_DIR` can be given to any Hugging Face loader.
"""

from pathlib import Path

CHECKPOINT_DIR = Path(__file__).resolve().parent / "checkpoint"
CHECKPOINT_SHA256 = "76232f25ef050aaeee7c5312ad9e3079f27ac7d3f1783a8568bbaee70564c488"  # of model.safetensors

# Plain AR base and the LoRA adapter for its MASK rows (`idlm serve --demo risd`).
RISD_BASE_DIR = Path(__file__).resolve().parent / "risd" / "base"
RISD_ADAPTER_DIR = RISD_BASE_DIR.parent / "adapter"
