"""The embedded checkpoint: a toy I-DLM, the script that trains it and the one that measures it.

Importing this package loads nothing heavy; `CHECKPOINT_DIR` can be given to any Hugging Face loader.
"""

from pathlib import Path

CHECKPOINT_DIR = Path(__file__).resolve().parent / "checkpoint"
CHECKPOINT_SHA256 = "7850826d34dc54ea1dc63f371f5b60293dd0134e45e80b3a79eaf369fa17d234"  # of model.safetensors
