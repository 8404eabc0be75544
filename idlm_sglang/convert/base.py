"""The base: an AR model of the Qwen3 family, its tokenizer, and the token that is to be its MASK."""

from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from idlm_sglang.checkpoint import ACCEPTED_ARCHITECTURES, AR_ARCHITECTURE, MASK_TOKEN, PUBLISHED_MODEL_TYPE, register_published_config, tokenizer_mask_id
from idlm_sglang.config import SettingError
from idlm_sglang.convert import attention

_FAMILY = ("qwen3", PUBLISHED_MODEL_TYPE)


def load_config(base: str) -> Any:
    """The base's configuration; :class:`SettingError` where there is none or it is of another family."""
    register_published_config()
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SettingError(f"BASE {base} cannot be loaded: {_line(error)}") from None
    names = config.architectures or []
    if config.model_type not in _FAMILY or not set(names) & set(ACCEPTED_ARCHITECTURES):
        raise SettingError(f"BASE {base} is a {config.model_type} with architectures {names}; allowed: the dense Qwen3 family ({AR_ARCHITECTURE})")
    return config


def load_tokenizer(base: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SettingError(f"BASE {base} has no tokenizer that can be loaded: {_line(error)}") from None


def mask_token(config: Any, tokenizer: Any, asked: str | None) -> tuple[int, str]:
    """The MASK id, and in words where it comes from.

    The config's ``mask_token_id``, else the tokenizer's MASK, else the first row of the embedding that no token uses. ``asked`` (a token or
    an id) goes before the last two.
    """
    named = getattr(config, "mask_token_id", None)
    size = config.vocab_size
    if asked is not None:
        found = tokenizer.get_vocab().get(asked, int(asked) if asked.isascii() and asked.isdigit() else None)
        if found is None or not 0 <= found < size:
            raise SettingError(f"--mask-token {asked} is no token of BASE; allowed: a token of its vocabulary, or an id from 0 to {size - 1}")
        if named is not None and named != found:
            raise SettingError(f"--mask-token {asked} (id {found}) contradicts BASE's config, whose mask_token_id is {named}; leave it out")
        return found, "as asked for"
    if named is not None and not 0 <= int(named) < size:
        raise SettingError(f"mask_token_id={named} in BASE's config is no row of its embedding; allowed: 0 to {size - 1}")
    if named is not None:
        return int(named), "mask_token_id of BASE's config"
    found = tokenizer_mask_id(tokenizer)
    if found is not None:
        return found, f"{tokenizer.convert_ids_to_tokens(found)} of BASE's tokenizer"
    used = max(tokenizer.get_vocab().values()) + 1
    if used < size:
        return used, f"a spare row of BASE's embedding ({size - used} of {size} have no token)"
    raise SettingError(f"BASE has no token to be MASK: no {MASK_TOKEN} in its tokenizer and no spare row among the {size} of its embedding; "
                       "allowed: --mask-token TOKEN, one it never needs")


def load_model(base: str, config: Any, device: torch.device, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """The base in `dtype`, ready to train, without dropout. Gradients are computed again layer by layer on a GPU."""
    config.attention_dropout = 0.0
    disable_progress_bar()
    kind = attention.NAME if device.type == "cpu" else "sdpa"
    try:
        model = Qwen3ForCausalLM.from_pretrained(base, config=config, dtype=dtype, attn_implementation=kind, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingError(f"BASE {base} cannot be loaded: {_line(error)}") from None
    if device.type == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device).train()


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
