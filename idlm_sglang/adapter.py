"""What a gated LoRA adapter's files say (PEFT's format), and whether it fits the base model."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idlm_sglang.config import SettingError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# The linear modules of a decoder layer, as the checkpoint names them.
MODULES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])(?:\.default)?\.weight")
# Read here, or of training alone; anything else in the configuration that is switched on changes what the adapter computes.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "bias", "base_model_name_or_path", "mask_token_id", "block_size"}
_OF_TRAINING = {"auto_mapping", "inference_mode", "init_lora_weights", "lora_dropout", "peft_version", "revision", "task_type"}
_OF_TRAINING |= {"megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk: module m computes ``W x + scaling * B (A x)`` at the rows it is gated to.

    Attributes:
        path: its directory.
        rank: r, rows of A and columns of B.
        scaling: lora_alpha / r, with rsLoRA lora_alpha / sqrt(r).
        targets: ``target_modules``: names, or one regular expression.
        mask_token_id: the MASK that it was trained on, None where its configuration says nothing.
        base: ``base_model_name_or_path``.
        block_size: MASK tokens per block that it was trained on, None where its configuration says nothing.
    """

    path: Path
    rank: int
    scaling: float
    targets: tuple[str, ...] | str
    mask_token_id: int | None
    base: str | None
    block_size: int | None = None

    def error(self, what: str, allowed: str) -> SettingError:
        """One line about this adapter."""
        return SettingError(f"IDLM_LORA={self.path}: {what}; allowed: {allowed}")

    def targeted(self, module: str) -> bool:
        """Whether a linear module of the base (its full name) is adapted, by PEFT's rules."""
        if isinstance(self.targets, str):
            return self.targets == "all-linear" or re.fullmatch(self.targets, module) is not None
        return any(module == target or module.endswith("." + target) for target in self.targets)


def read_adapter(path: str) -> Adapter:
    """An adapter's configuration. Raises :class:`SettingError` for what is not served, by name."""
    directory = Path(path).expanduser()
    adapter = Adapter(directory, 1, 1.0, (), None, None)
    if not (directory / CONFIG_FILE).is_file():
        raise adapter.error(f"holds no {CONFIG_FILE}", "the directory of an adapter in PEFT's format")
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
    except ValueError as error:
        raise adapter.error(f"{CONFIG_FILE} is not JSON ({error})", "PEFT's configuration of a LoRA adapter") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise adapter.error(f"peft_type {config.get('peft_type') if isinstance(config, dict) else None!r} is not served", "LORA")
    rank, alpha, targets, mask, block = (config.get(name) for name in ("r", "lora_alpha", "target_modules", "mask_token_id", "block_size"))
    if not _whole(rank) or rank < 1:
        raise adapter.error(f"rank r = {rank!r} is not valid", "an integer >= 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise adapter.error(f"lora_alpha = {alpha!r} is not valid", "a number")
    if config.get("bias", "none") != "none":
        raise adapter.error(f"bias = {config['bias']!r} is not served", "none")
    for name in sorted(set(config) - _READ - _OF_TRAINING):
        if config[name]:
            raise adapter.error(f"{name} = {json.dumps(config[name])} is not served", "plain LoRA, without it")
    if not targets or not (isinstance(targets, str) or isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise adapter.error(f"target_modules = {targets!r} is not valid", ", ".join(MODULES))
    for name in [targets] if isinstance(targets, str) else targets:
        if name.split(".")[-1] in ("lm_head", "embed_tokens"):
            raise adapter.error(f"target_modules names {name}: the LM head and the embedding are not adapted", ", ".join(MODULES))
    if mask is not None and not _whole(mask):
        raise adapter.error(f"mask_token_id = {mask!r} is not valid", "a token id")
    if block is not None and (not _whole(block) or block < 1):
        raise adapter.error(f"block_size = {block!r} is not valid", "MASK tokens per block, an integer >= 1")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Adapter(directory, rank, scaling, targets if isinstance(targets, str) else tuple(targets), mask, config.get("base_model_name_or_path"), block)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def module_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of each linear module of a Qwen3 decoder layer, from the Hugging Face config."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        "q_proj": (q, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, q),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def weight_keys(adapter: Adapter, config: Any) -> dict[tuple[int, str], tuple[str, str]]:
    """By (layer, module): the names of A and B in the file.

    Raises:
        SettingError: the file is missing or cannot be read, a tensor is of no module that is adapted, a module that
            ``target_modules`` names is missing, or the adapter is another base's: a layer or a shape does not fit.
    """
    shapes, layers = module_shapes(config), config.num_hidden_layers
    found: dict[tuple[int, str], dict[str, str]] = {}
    with _opened(adapter) as file:
        for key in file.keys():
            match = _KEY.fullmatch(key)
            if match is None or match[2] not in MODULES:
                head = ": the LM head and the embedding are not adapted" if re.search("lm_head|embed_tokens", key) else ""
                raise adapter.error(f"{WEIGHTS_FILE} has {key}, which is not served{head}", f"lora_A and lora_B of {', '.join(MODULES)}")
            layer, module, side = int(match[1]), match[2], match[3]
            if layer >= layers:
                raise adapter.error(f"it has layer {layer}, the base model has {layers} layers", "an adapter made for this base")
            out, inside = shapes[module]
            want, shape = ((adapter.rank, inside) if side == "A" else (out, adapter.rank)), tuple(file.get_slice(key).get_shape())
            if shape != want:
                raise adapter.error(f"{key} is {_by(shape)}, rank {adapter.rank} on this base needs {_by(want)}", "an adapter made for this base")
            found.setdefault((layer, module), {})[side] = key
    wanted = [(i, m) for i in range(layers) for m, name in MODULES.items() if adapter.targeted(f"model.layers.{i}.{name}")]
    if not wanted:
        raise adapter.error(f"target_modules = {adapter.targets!r} names no linear module of the base", ", ".join(MODULES))
    for place in wanted:
        for side in "AB":
            if side not in found.get(place, {}):
                raise adapter.error(f"layer {place[0]} lacks lora_{side} of {place[1]}, which target_modules names", "both of every module")
    extra = min((place for place in found if place not in wanted), default=None)
    if extra is not None:
        raise adapter.error(f"layer {extra[0]} has {extra[1]}, which target_modules does not name", "the modules of target_modules")
    return {place: (found[place]["A"], found[place]["B"]) for place in wanted}


def pairs(adapter: Adapter, config: Any) -> Iterator[tuple[int, str, Any, Any]]:
    """Layer, module, A ``(r, in)`` and B ``(out, r)`` of everything that is adapted, tensors as stored. Errors of :func:`weight_keys`."""
    keys = weight_keys(adapter, config)
    with _opened(adapter) as file:
        for (layer, module), (a, b) in keys.items():
            yield layer, module, file.get_tensor(a), file.get_tensor(b)


def check_adapter(adapter: Adapter, config: Any) -> None:
    """Raise :class:`SettingError` unless the adapter fits the base of this config and all of its numbers are finite."""
    for layer, module, *sides in pairs(adapter, config):
        for side, weight in zip("AB", sides):
            if not weight.is_floating_point():
                raise adapter.error(f"layer {layer}: lora_{side} of {module} is {weight.dtype}", "a floating-point type")
            if not weight.isfinite().all():
                raise adapter.error(f"layer {layer}: lora_{side} of {module} holds NaN or infinity", "finite weights")


def _opened(adapter: Adapter):
    from safetensors import SafetensorError, safe_open

    path = adapter.path / WEIGHTS_FILE
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        reason = "is missing" if not path.is_file() else f"cannot be read ({str(error).splitlines()[0]})"
        raise adapter.error(f"{WEIGHTS_FILE} {reason}", "PEFT's safetensors file") from None


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
