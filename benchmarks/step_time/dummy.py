"""A checkpoint directory without weights: Qwen3-8B's dimensions as an I-DLM, for SGLang's ``--load-format dummy``.

A step's time does not depend on what the weights are, only on their shapes; its acceptance does, and is not measured here.
"""

import json
from pathlib import Path

# config.json of Qwen3-8B and of the published 8B checkpoint: the same shapes, untied embeddings, bf16.
DIMENSIONS = {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "mask_token_id": 151669,
}
_REST = {
    "architectures": ["IDLMForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}

FLAGS = ("--load-format", "dummy", "--skip-tokenizer-init")


def write(directory: Path, overrides: dict[str, int]) -> Path:
    """``directory`` with a config.json of DIMENSIONS, some of them replaced. A smaller vocabulary moves MASK to its end."""
    dimensions = {**DIMENSIONS, **overrides}
    if "mask_token_id" not in overrides:
        dimensions["mask_token_id"] = min(dimensions["mask_token_id"], dimensions["vocab_size"] - 1)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**_REST, **dimensions}, indent=1) + "\n")
    return directory
