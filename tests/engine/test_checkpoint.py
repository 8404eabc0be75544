"""Which checkpoints are served, and where MASK comes from."""

from types import SimpleNamespace

import pytest

from idlm_sglang import checkpoint
from idlm_sglang.config import SettingError


class Tokenizer:
    def __init__(self, mask=None, vocab=None):
        self.mask_token_id, self._vocab = mask, vocab or {}

    def get_vocab(self):
        return self._vocab


def resolve(config_id=None, tokenizer=None, setting=None, vocab=100):
    config = SimpleNamespace(**({} if config_id is None else {"mask_token_id": config_id}))
    return checkpoint.resolve_mask_token_id(config, None if tokenizer is None else lambda: tokenizer, setting, vocab)


def test_mask_comes_from_the_config_then_the_tokenizer_then_the_setting():
    assert resolve(5, Tokenizer(6), 5) == (5, "config")
    assert resolve(None, Tokenizer(6)) == (6, "tokenizer")
    assert resolve(None, Tokenizer(None, {"<|MASK|>": 8})) == (8, "tokenizer")
    assert resolve(None, Tokenizer(), 9) == (9, "IDLM_MASK_TOKEN_ID")
    assert resolve(0, None, None) == (0, "config"), "id 0 is an id"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, ["no mask_token_id", "IDLM_MASK_TOKEN_ID is not set", "below 100"]),
        ({"tokenizer": Tokenizer()}, ["no mask_token_id"]),
        ({"config_id": 100}, ["100", "outside the vocabulary", "0 to 99"]),
        ({"setting": 4000}, ["4000", "IDLM_MASK_TOKEN_ID", "0 to 99"]),
        ({"config_id": 5, "setting": 6}, ["IDLM_MASK_TOKEN_ID=6", "contradicts", "5"]),
    ],
)
def test_a_missing_foreign_or_contradicted_mask_is_one_line(arguments, words):
    with pytest.raises(SettingError) as error:
        resolve(**arguments)
    assert "\n" not in str(error.value) and all(w in str(error.value) for w in words), error.value


@pytest.mark.parametrize("name", ["IDLMForCausalLM", "SDARForCausalLM", "Qwen3ForCausalLM"])
def test_accepted_architectures(name):
    assert checkpoint.check_architecture([name]) == name


@pytest.mark.parametrize("names", [["LlamaForCausalLM"], ["Qwen3MoeForCausalLM"], [], None])
def test_other_architectures_are_refused_with_the_list(names):
    with pytest.raises(SettingError, match="allowed: IDLMForCausalLM, SDARForCausalLM, Qwen3ForCausalLM"):
        checkpoint.check_architecture(names)


def test_the_published_model_type_needs_no_remote_code(tmp_path):
    """Registered twice without harm; auto_map is not followed, also when remote code is trusted; the class pickles."""
    import json
    import pickle

    from transformers import AutoConfig

    checkpoint.register_published_config()
    checkpoint.register_published_config()
    keys = {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "mask_token_id": 151669, "block_size": 3, "hidden_size": 4096}
    keys["auto_map"] = {"AutoConfig": "configuration_sdar.SDARConfig"}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    (tmp_path / "configuration_sdar.py").write_text("raise SystemExit('remote code ran')")
    for trust in (False, True):
        config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(config).__name__ == "SdarConfig" and config.mask_token_id == 151669 and config.block_size == 3
    assert pickle.loads(pickle.dumps(config)).hidden_size == 4096
