"""The embedded checkpoint: a toy I-DLM, the script that trains it and the one that measures it.

Importing this package loads nothing heavy; `CHECKPOINT_DIR` can be given to any Hugging Face loader.
"""

from pathlib import Path

CHECKPOINT_DIR = Path(__file__).resolve().parent / "checkpoint"
CHECKPOINT_SHA256 = "2bca68bcb3a56f8fb0c12e12d922e8f53db17f412ddd85c4fd52b3c6c23425ff"  # of model.safetensors
