"""The published checkpoints' configuration, served unmodified: the right class, no remote code, in every process."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from idlm_sglang.demo import CHECKPOINT_DIR
from tests.server.harness import Server, differing, prompts, side_by_side

# The 8B's config.json, its sizes scaled down; every key and name as published.
PUBLISHED = {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_implementation": "flex_attention",
    "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
    "block_size": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "fuse_cross_entropy": True,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "mask_token_id": 3,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "sdar",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 1024,
}
TRAP = 'raise SystemExit("remote code of the checkpoint was executed")\n'


def random_weights(config: dict) -> dict[str, torch.Tensor]:
    """Weights with Qwen3's names and shapes; large enough that greedy decoding does not stand still."""
    g = torch.Generator().manual_seed(0)
    h, f, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=g) * 1.5 / columns**0.5

    weights = {"model.embed_tokens.weight": torch.randn(config["vocab_size"], h, generator=g), "lm_head.weight": matrix(config["vocab_size"], h)}
    weights["model.norm.weight"] = torch.ones(h)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        weights |= {at + n + ".weight": torch.ones(h) for n in ("input_layernorm", "post_attention_layernorm")}
        weights |= {at + "self_attn." + n + ".weight": torch.ones(d) for n in ("q_norm", "k_norm")}
        weights |= {at + "self_attn.q_proj.weight": matrix(q, h), at + "self_attn.k_proj.weight": matrix(kv, h)}
        weights |= {at + "self_attn.v_proj.weight": matrix(kv, h), at + "self_attn.o_proj.weight": matrix(h, q)}
        weights |= {at + "mlp.gate_proj.weight": matrix(f, h), at + "mlp.up_proj.weight": matrix(f, h), at + "mlp.down_proj.weight": matrix(h, f)}
    return {name: w.to(torch.bfloat16) for name, w in weights.items()}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint directory of the published shape, with remote code that must never run."""
    at = tmp_path_factory.mktemp("published")
    (at / "config.json").write_text(json.dumps(PUBLISHED))
    for name in ("configuration_sdar.py", "modeling_sdar.py"):
        (at / name).write_text(TRAP)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT_DIR / name, at / name)
    save_file(random_weights(PUBLISHED), at / "model.safetensors", {"format": "pt"})
    assert load_file(at / "model.safetensors")
    return str(at)


def test_the_published_config_is_served_as_an_idlm(published, logs):
    """AR (rollback: no ISD flag) and ISD, the latter even under --trust-remote-code, agree token for token."""
    calls = [{"prompt": p, "temperature": 0, "max_new_tokens": 24, "ignore_eos": True} for p in prompts(60, seed=111)]
    ar, isd = Server("published_ar", published, logs), Server("published_isd", published, logs, "--speculative-algorithm", "ISD", "--trust-remote-code")
    with side_by_side(ar, isd):
        want, got = ar.many(calls, 8), isd.many(calls, 8)
        ar_log, isd_log = (server.log.read_text(errors="replace") for server in (ar, isd))
    assert not differing(want, got)
    assert not any(3 in a["output_ids"] for a in got), "MASK was emitted"
    for log in (ar_log, isd_log):
        assert "type=IDLMForCausalLM" in log, "another class was loaded"
        assert "remote code of the checkpoint was executed" not in log
    assert "A genuine block-diffusion SDAR model uses the same name" in isd_log
    assert "idlm: MASK token 3 (from the config)" in isd_log
    assert "the model accepts almost none of its own drafts" in isd_log, "random weights accept nothing: a warning is due"
