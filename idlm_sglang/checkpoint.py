"""What a checkpoint says before it is loaded: is it servable as an I-DLM, which token is MASK, are its weights complete."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from idlm_sglang.config import SettingError

ARCHITECTURE = "IDLMForCausalLM"
PUBLISHED_ARCHITECTURE = "SDARForCausalLM"
AR_ARCHITECTURE = "Qwen3ForCausalLM"
PUBLISHED_MODEL_TYPE = "sdar"
MASK_TOKEN = "<|MASK|>"
WEIGHTS_INDEX, OTHER_WEIGHTS = "model.safetensors.index.json", (".bin", ".pt", ".pth")

ACCEPTED_ARCHITECTURES = (ARCHITECTURE, PUBLISHED_ARCHITECTURE, AR_ARCHITECTURE)

SDAR_NOTE = (
    "this checkpoint calls itself SDARForCausalLM: it is served as an I-DLM (strictly causal). A genuine block-diffusion "
    "SDAR model uses the same name and MASK id and needs SGLang's --dllm-algorithm instead of --speculative-algorithm ISD"
)


def check_architecture(architectures: list[str] | None) -> str:
    """The checkpoint's architecture name, if it can be served; :class:`SettingError` otherwise."""
    names = list(architectures or [])
    for name in names:
        if name in ACCEPTED_ARCHITECTURES:
            return name
    raise SettingError(
        f"the checkpoint's architectures {names} cannot be served with --speculative-algorithm ISD; "
        f"allowed: {', '.join(ACCEPTED_ARCHITECTURES)}"
    )


def check_weights(path: Path) -> None:
    """Every safetensors file of a checkpoint on disk that is loaded is there, and as long as its header says; no weight is read.

    Raises:
        SettingError: no weights, an index that cannot be read, a shard that it names and the directory lacks, or a file that was cut off.
    """
    from safetensors import SafetensorError, safe_open

    index = path / WEIGHTS_INDEX
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SettingError(f"{index} cannot be read; allowed: the index of a checkpoint in safetensors, or none") from None
    if missing := sorted(name for name in shards if not (path / name).is_file()):
        raise SettingError(f"{path} lacks {', '.join(missing[:3])}{' ...' if missing[3:] else ''}, which its {WEIGHTS_INDEX} names; allowed: a complete checkpoint")
    files = sorted(path / name for name in shards) or sorted(path.glob("*.safetensors"))
    if not files and not any(file.suffix in OTHER_WEIGHTS for file in path.iterdir()):
        raise SettingError(f"{path} holds no weights; allowed: a checkpoint with *.safetensors, or --load-format dummy")
    for file in files:
        try:
            safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise SettingError(f"{file} cannot be read ({str(error).splitlines()[0]}); allowed: a complete safetensors file") from None


def tokenizer_mask_id(tokenizer: Any) -> int | None:
    """The MASK id a tokenizer knows: its ``mask_token``, else a token spelled ``<|MASK|>``."""
    if getattr(tokenizer, "mask_token_id", None) is not None:
        return int(tokenizer.mask_token_id)
    found = tokenizer.get_vocab().get(MASK_TOKEN)
    return None if found is None else int(found)


def resolve_mask_token_id(
    config: Any, load_tokenizer: Callable[[], Any] | None, setting: int | None, vocab_size: int, adapter: int | None = None
) -> tuple[int, str]:
    """MASK id and where it came from: the adapter, the config's ``mask_token_id``, then the tokenizer, then ``IDLM_MASK_TOKEN_ID``.

    Args:
        config: the Hugging Face config.
        load_tokenizer: called only when the config names no MASK; None where there is no tokenizer.
        setting: ``IDLM_MASK_TOKEN_ID``.
        vocab_size: ids from here on are outside the embedding.
        adapter: the ``mask_token_id`` of a LoRA adapter's configuration.

    Raises:
        SettingError: no MASK anywhere, two sources disagree, or the id is outside the vocabulary.
    """
    found, source = getattr(config, "mask_token_id", None), "config"
    if adapter is not None:
        if found not in (None, adapter):
            raise SettingError(f"the adapter says MASK is {adapter}, the base model's config.json {found}; allowed: the same mask_token_id in both, or in one")
        found, source = adapter, "adapter"
    if found is None and load_tokenizer is not None:
        found, source = tokenizer_mask_id(load_tokenizer()), "tokenizer"
    if found is None:
        found, source = setting, "IDLM_MASK_TOKEN_ID"
    elif setting is not None and setting != found:
        raise SettingError(f"IDLM_MASK_TOKEN_ID={setting} contradicts the {source}, which says MASK is {found}; unset it")
    if found is None:
        raise SettingError(
            "the checkpoint names no MASK token: no mask_token_id in config.json (nor in an adapter's), none in the tokenizer "
            f"(mask_token or {MASK_TOKEN}), and IDLM_MASK_TOKEN_ID is not set; allowed: a token id below {vocab_size}"
        )
    if not 0 <= found < vocab_size:
        raise SettingError(f"MASK token id {found} (from {source}) is outside the vocabulary; allowed: 0 to {vocab_size - 1}")
    return int(found), source


def register_published_config() -> None:
    """Make ``model_type: sdar`` known to transformers in this process, as the Qwen3 configuration it is.

    Without it ``AutoConfig`` would need the checkpoint's remote code. A class registered here wins over ``auto_map``
    also under ``--trust-remote-code``, so no remote code runs.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.qwen2 import Qwen2TokenizerFast

    from idlm_sglang.sdar_config import SdarConfig

    if PUBLISHED_MODEL_TYPE in CONFIG_MAPPING:
        return
    AutoConfig.register(PUBLISHED_MODEL_TYPE, SdarConfig)
    AutoTokenizer.register(SdarConfig, fast_tokenizer_class=Qwen2TokenizerFast)
