"""What an adapter's files may say: every one that is not served is refused in one line that names what is wrong."""

import json
import math
from types import SimpleNamespace

import peft
import pytest
import torch

from idlm_sglang import checkpoint
from idlm_sglang.adapter import CONFIG_FILE, WEIGHTS_FILE, check_adapter, read_adapter, weight_keys
from idlm_sglang.config import SettingError, read_settings
from idlm_sglang.demo import CHECKPOINT_DIR
from tests.adapters import key, write_adapter

BASE = SimpleNamespace(**json.loads((CHECKPOINT_DIR / "config.json").read_text()))


def written(tmp_path, **changes):
    return write_adapter(tmp_path / "adapter", CHECKPOINT_DIR, **changes)


def refused(path, base=BASE):
    with pytest.raises(SettingError) as error:
        check_adapter(read_adapter(path), base)
    line = str(error.value)
    assert line.startswith(f"idlm: IDLM_LORA={path}: ") and "; allowed: " in line and "\n" not in line
    return line


def test_a_sound_adapter_is_read(tmp_path):
    adapter = read_adapter(written(tmp_path, rank=4, lora_alpha=6))
    check_adapter(adapter, BASE)
    assert (adapter.rank, adapter.scaling, adapter.mask_token_id, adapter.block_size) == (4, 1.5, 3, None)
    assert len(weight_keys(adapter, BASE)) == 7 * BASE.num_hidden_layers
    assert read_adapter(written(tmp_path, rank=4, lora_alpha=6, use_rslora=True)).scaling == 6 / math.sqrt(4)
    assert read_adapter(written(tmp_path, block_size=11)).block_size == 11


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*layers\.[02]\..*proj", "all-linear"])
def test_the_modules_that_peft_would_adapt_are_adapted(tmp_path, targets):
    """A list of names, one regular expression, or every linear layer: what PEFT makes of the same configuration."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=4))
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    made.save_pretrained(tmp_path)
    adapter = read_adapter(str(tmp_path))
    keys = weight_keys(adapter, model.config)
    assert 2 * len(keys) == sum("lora_" in name for name, _ in made.named_parameters())


def poison(layer, module, side, value):
    return lambda weights: weights[key(layer, module, side)].view(-1)[-1:].fill_(value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"r": 0}, ["rank r = 0", "an integer >= 1"]),
        ({"r": None}, ["rank r = None"]),
        ({"r": True}, ["rank r = True"]),
        ({"lora_alpha": "x"}, ["lora_alpha = 'x'", "a number"]),
        ({"peft_type": "IA3"}, ["peft_type 'IA3'", "LORA"]),
        ({"bias": "all"}, ["bias = 'all'", "none"]),
        ({"use_dora": True}, ["use_dora = true", "plain LoRA"]),
        ({"modules_to_save": ["lm_head"]}, ['modules_to_save = ["lm_head"]']),
        ({"rank_pattern": {"q_proj": 4}}, ["rank_pattern"]),
        ({"alpha_pattern": {"q_proj": 4}}, ["alpha_pattern"]),
        ({"layers_to_transform": [0]}, ["layers_to_transform = [0]"]),
        ({"fan_in_fan_out": True}, ["fan_in_fan_out"]),
        ({"a_feature_of_tomorrow": 1}, ["a_feature_of_tomorrow = 1"]),
        ({"target_modules": ["q_proj", "lm_head"]}, ["names lm_head", "the LM head and the embedding are not adapted"]),
        ({"target_modules": ["embed_tokens"]}, ["names embed_tokens"]),
        ({"target_modules": []}, ["target_modules = []"]),
        ({"target_modules": ["c_attn"]}, ["names no linear module of the base", "q_proj"]),
        ({"target_modules": ["q_proj"]}, ["layer 0 has down_proj, which target_modules does not name"]),
        ({"mask_token_id": "three"}, ["mask_token_id = 'three'"]),
        ({"block_size": 0}, ["block_size = 0"]),
        ({"block_size": "three"}, ["block_size = 'three'"]),
        ({"change": poison(1, "down_proj", "B", math.nan)}, ["layer 1: lora_B of down_proj holds NaN"]),
        ({"change": poison(0, "q_proj", "A", math.inf)}, ["layer 0: lora_A of q_proj", "infinity"]),
        ({"change": lambda w: w.pop(key(2, "k_proj", "B"))}, ["layer 2 lacks lora_B of k_proj"]),
        ({"change": lambda w: [w.pop(key(i, "up_proj", s)) for i in range(4) for s in "AB"]}, ["layer 0 lacks lora_A of up_proj, which target_modules names"]),
        ({"change": lambda w: w.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)})}, ["lm_head.lora_A.weight", "the LM head"]),
        ({"change": lambda w: w.update({"base_model.model.model.norm.weight": torch.zeros(2)})}, ["norm.weight, which is not served"]),
        ({"change": lambda w: w.update({key(4, "q_proj", "A"): torch.zeros(2, 256)})}, ["it has layer 4, the base model has 4 layers", "made for this base"]),
        ({"change": lambda w: w.update({key(0, "q_proj", "A"): torch.zeros(2, 512)})}, ["layers.0.self_attn.q_proj.lora_A.weight is 2 x 512", "needs 2 x 256"]),
        ({"rank": 2, "r": 4}, ["rank 4 on this base needs"]),
    ],
    ids=lambda value: str(value).split(" at 0x")[0][:50],
)
def test_what_is_not_served_is_named(tmp_path, changes, words):
    line = refused(written(tmp_path, **changes))
    assert all(word in line for word in words), line


def test_files_that_are_missing_or_cannot_be_read_are_named(tmp_path):
    path = written(tmp_path)
    (tmp_path / "adapter" / WEIGHTS_FILE).write_bytes(b"torch")
    assert f"{WEIGHTS_FILE} cannot be read" in refused(path)
    (tmp_path / "adapter" / WEIGHTS_FILE).unlink()
    assert f"{WEIGHTS_FILE} is missing" in refused(path)
    (tmp_path / "adapter" / CONFIG_FILE).write_text("{")
    assert f"{CONFIG_FILE} is not JSON" in refused(path)
    (tmp_path / "adapter" / CONFIG_FILE).unlink()
    assert f"holds no {CONFIG_FILE}" in refused(path)


@pytest.mark.parametrize("size", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads"])
def test_an_adapter_of_another_base_is_refused(tmp_path, size):
    path = written(tmp_path)
    for factor in (0.5, 2):
        line = refused(path, SimpleNamespace(**{**vars(BASE), size: int(getattr(BASE, size) * factor)}))
        assert "this base" in line or "lacks" in line


def test_every_default_of_peft_s_configuration_is_accepted(tmp_path):
    """What PEFT writes about training, and features that are off, stand in nobody's way; every one switched on is named."""
    import dataclasses

    config = {f.name: f.default for f in dataclasses.fields(peft.LoraConfig) if f.default is not dataclasses.MISSING}
    config = {name: value for name, value in config.items() if isinstance(value, str | int | float | bool | None) and name not in ("peft_type", "r", "target_modules")}
    read_adapter(written(tmp_path, **config))
    switches = [name for name, value in config.items() if value is False and name not in ("inference_mode", "use_rslora")]
    assert len(switches) > 3
    for name in switches:
        if "ensure" not in name:
            assert f"{name} = true" in refused(written(tmp_path, **{**config, name: True}))


def test_mask_is_the_adapter_s_and_may_not_contradict_the_base():
    def resolve(adapter=None, config=None, setting=None):
        return checkpoint.resolve_mask_token_id(SimpleNamespace(mask_token_id=config), None, setting, 100, adapter)

    assert resolve(adapter=7) == (7, "adapter") and resolve(7, 7, 7) == (7, "adapter")
    for arguments, words in [
        ((7, 8), ["the adapter says MASK is 7", "config.json 8"]),
        ((7, None, 8), ["IDLM_MASK_TOKEN_ID=8", "contradicts the adapter"]),
        ((100,), ["100", "from adapter", "outside the vocabulary"]),
        ((), ["names no MASK token", "adapter"]),
    ]:
        with pytest.raises(SettingError) as error:
            resolve(*arguments)
        assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_the_setting_names_a_directory(tmp_path):
    assert read_settings(environ={"IDLM_LORA": str(tmp_path)}).lora == str(tmp_path)
    for value in (str(tmp_path / "none"), ""):
        with pytest.raises(SettingError, match="IDLM_LORA=.*allowed: the directory of an adapter"):
            read_settings(environ={"IDLM_LORA": value})
