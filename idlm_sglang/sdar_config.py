"""The configuration class behind the published checkpoints' ``model_type: sdar``: Qwen3's, by its fields and defaults.

A module of its own, because it imports transformers and because SGLang pickles the class into its processes.
"""

from transformers import Qwen3Config

from idlm_sglang.checkpoint import PUBLISHED_MODEL_TYPE


class SdarConfig(Qwen3Config):
    """I-DLM checkpoints as published; unknown keys (``mask_token_id``, ``block_size``) are kept as attributes."""

    model_type = PUBLISHED_MODEL_TYPE
