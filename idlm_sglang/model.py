"""The I-DLM model class: Qwen3, strictly causal, whose MASK logit is removed (that of a base model under an adapter is kept)."""

from contextlib import contextmanager

import torch
from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessor, LogitsProcessorOutput
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from torch import nn

from idlm_sglang.config import SettingError


class MaskFreeLogitsProcessor(LogitsProcessor):
    """Logits over the real tokens: MASK is an input, never an answer.

    The removal sits here so that it holds alike in AR and ISD serving, for sampled tokens, logprobs and prompt logprobs.
    ``mask_token_id`` None: nothing is removed. A base model under an adapter answers as its AR serving does, whose class keeps them all.
    """

    def __init__(self, config, mask_token_id: int | None):
        super().__init__(config)
        self.mask_token_id = mask_token_id
        self._rows: torch.Tensor | None = None

    @contextmanager
    def reading(self, rows: torch.Tensor):
        """In here an extend forward gives the logits of these rows ``(R,)`` int64, not of each request's last one."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def forward(self, input_ids, hidden_states, lm_head, logits_metadata, *args, **kwargs) -> LogitsProcessorOutput:
        if self._rows is None:
            return super().forward(input_ids, hidden_states, lm_head, logits_metadata, *args, **kwargs)
        metadata = LogitsMetadata.from_forward_batch(logits_metadata)
        return LogitsProcessorOutput(next_token_logits=self._get_logits(hidden_states[self._rows], lm_head, metadata))

    def _get_logits(self, *args, **kwargs) -> torch.Tensor:
        logits = super()._get_logits(*args, **kwargs)
        if self.mask_token_id is not None:
            logits.select(-1, self.mask_token_id).fill_(float("-inf"))
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
            self.logits_processor = MaskFreeLogitsProcessor(config, None if getattr(config, "idlm_keeps_mask", False) else int(mask_token_id))


EntryClass = IDLMForCausalLM
