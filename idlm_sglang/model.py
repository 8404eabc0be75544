"""The I-DLM model class: Qwen3, strictly causal, whose MASK logit is removed."""

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from torch import nn

from idlm_sglang.config import SettingError


class MaskFreeLogitsProcessor(LogitsProcessor):
    """Logits over the real tokens: MASK is an input, never an answer.

    The removal sits here so that it holds alike in AR and ISD serving, for sampled tokens, logprobs and prompt logprobs.
    """

    def __init__(self, config, mask_token_id: int):
        super().__init__(config)
        self.mask_token_id = mask_token_id

    def _get_logits(self, *args, **kwargs) -> torch.Tensor:
        logits = super()._get_logits(*args, **kwargs)
        logits[..., self.mask_token_id] = float("-inf")
        return logits


class IDLMForCausalLM(Qwen3ForCausalLM):
    """Qwen3 for I-DLM checkpoints; sharding and weight names are Qwen3's.

    Raises:
        SettingError: the config has no ``mask_token_id`` (the plugin resolves it before the model is built).
    """

    def __init__(self, config, quant_config=None, prefix: str = "") -> None:
        super().__init__(config, quant_config=quant_config, prefix=prefix)
        mask_token_id = getattr(config, "mask_token_id", None)
        if mask_token_id is None or not 0 <= mask_token_id < config.vocab_size:
            raise SettingError(f"mask_token_id={mask_token_id} in the model config; allowed: 0 to {config.vocab_size - 1}")
        if not isinstance(self.lm_head, nn.Identity):
            self.logits_processor = MaskFreeLogitsProcessor(config, int(mask_token_id))


EntryClass = IDLMForCausalLM
