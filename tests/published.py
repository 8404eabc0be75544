"""Checkpoints of the published dimensions, with few layers and random weights.

    python -m tests.published idlm DIR [--layers 2]        # I-DLM-8B: config.json, shards, tokenizer and remote code by the published names
    python -m tests.published risd DIR [--layers 2]        # DIR/Qwen3-8B, and DIR/I-DLM-8B-lora-r128 for it, written by peft

Width 4096, 32 query and 8 KV heads of 128, FFN 12288, a vocabulary of 151,936 of which the tokenizer names 151,670 (Qwen3-8B's: 151,669), untied
embeddings, bf16. All token embeddings share a direction (`COMMON`), so that the distributions of a step's rows are alike: some drafts stand, some fall.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer

from idlm_sglang.demo import CHECKPOINT_DIR

# The 8B's config.json: every key and name as published.
CONFIG = {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_implementation": "flex_attention",
    "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
    "block_size": 3,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "fuse_cross_entropy": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "mask_token_id": 151669,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "sdar",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_OF_SDAR = ("attn_implementation", "auto_map", "block_size", "fuse_cross_entropy", "mask_token_id")
BASE_CONFIG = {k: v for k, v in CONFIG.items() if k not in _OF_SDAR} | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
TRAP = 'raise SystemExit("remote code of the checkpoint was executed")\n'
ADAPTER, BASE, RANK = "I-DLM-8B-lora-r128", "Qwen3-8B", 128
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMMON, SPREAD = 4.0, 6.0
"""Length of the embeddings' common part over that of their own; standard deviation of the logits."""

# Qwen3's added tokens, those that matter by their names; MASK is the I-DLM's alone.
ADDED = {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>", 151657: "<tool_call>", 151658: "</tool_call>", 151667: "<think>", 151668: "</think>"}
MASK_TOKEN = {151669: "<|MASK|>"}


def random_shards(config: dict, common: float = 0.0, spread: float = 1.5):
    """Weights with Qwen3's names and shapes, bf16, shard by shard; large enough that greedy decoding does not stand still.

    Args:
        common: length of the part that all token embeddings share, over that of their own part.
        spread: standard deviation of the logits.
    """
    g = torch.Generator().manual_seed(0)
    h, f, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d

    def matrix(rows, columns, scale=1.5):
        return torch.randn(rows, columns, generator=g).mul_(scale / columns**0.5).to(torch.bfloat16)

    def ones(size):
        return torch.ones(size, dtype=torch.bfloat16)

    shared = common * torch.randn(h, generator=g)
    yield {"model.embed_tokens.weight": torch.randn(config["vocab_size"], h, generator=g).add_(shared).to(torch.bfloat16)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        weights = {at + n + ".weight": ones(h) for n in ("input_layernorm", "post_attention_layernorm")}
        weights |= {at + "self_attn." + n + ".weight": ones(d) for n in ("q_norm", "k_norm")}
        weights |= {at + "self_attn.q_proj.weight": matrix(q, h), at + "self_attn.k_proj.weight": matrix(kv, h)}
        weights |= {at + "self_attn.v_proj.weight": matrix(kv, h), at + "self_attn.o_proj.weight": matrix(h, q)}
        yield weights | {at + "mlp.gate_proj.weight": matrix(f, h), at + "mlp.up_proj.weight": matrix(f, h), at + "mlp.down_proj.weight": matrix(h, f)}
    yield {"model.norm.weight": ones(h), "lm_head.weight": matrix(config["vocab_size"], h, spread)}


def write_model(at: Path, config: dict, added: dict[int, str]) -> Path:
    """config.json, weights in several files with their index, and a tokenizer."""
    at.mkdir(parents=True, exist_ok=True)
    (at / "config.json").write_text(json.dumps(config, indent=2))
    shards, total, files = config["num_hidden_layers"] + 2, 0, {}
    for i, weights in enumerate(random_shards(config, COMMON, SPREAD), 1):
        name = f"model-{i:05d}-of-{shards:05d}.safetensors"
        save_file(weights, at / name, {"format": "pt"})
        files |= dict.fromkeys(weights, name)
        total += sum(weight.nbytes for weight in weights.values())
    (at / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2))
    write_tokenizer(at, added)
    return at


def write_tokenizer(at: Path, added: dict[int, str]) -> None:
    """The embedded checkpoint's merges, then words that no merge makes (" w1020", ..), then the added tokens at their published ids."""
    small = json.loads((CHECKPOINT_DIR / "tokenizer.json").read_text())
    specials = {token["content"] for token in small["added_tokens"]}
    words = [token for token in small["model"]["vocab"] if token not in specials]
    words += [f"Ġw{i}" for i in range(len(words), min(added))]
    small["model"]["vocab"] = {token: i for i, token in enumerate(words)}
    small["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(small))
    names = [added.get(i, f"<|added_{i}|>") for i in range(min(added), max(added) + 1)]
    tokenizer.add_tokens([AddedToken(name, special="|" in name, normalized=False) for name in names])
    assert all(tokenizer.token_to_id(name) == i for i, name in added.items())
    tokenizer.save(str(at / "tokenizer.json"))
    config = json.loads((CHECKPOINT_DIR / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"], config["mask_token"]
    (at / "tokenizer_config.json").write_text(json.dumps(config))


def write_idlm(at: Path, layers: int, vocab: int = CONFIG["vocab_size"]) -> Path:
    """I-DLM-8B, with remote code that must never run."""
    write_model(at, CONFIG | {"num_hidden_layers": layers, "vocab_size": vocab}, ADDED | MASK_TOKEN)
    for name in ("configuration_sdar.py", "modeling_sdar.py"):
        (at / name).write_text(TRAP)
    return at


def write_risd(at: Path, layers: int, vocab: int = CONFIG["vocab_size"]) -> tuple[Path, Path]:
    """(Qwen3-8B, the adapter for it: all seven modules, PEFT's own random A and B, its default alpha)."""
    import peft
    from transformers import Qwen3Config, Qwen3ForCausalLM

    base = write_model(at / BASE, BASE_CONFIG | {"num_hidden_layers": layers, "vocab_size": vocab}, ADDED)
    # The adapter does not touch the vocabulary: a model with next to none is a gigabyte smaller.
    torch.manual_seed(1)
    less = {"num_hidden_layers": layers, "vocab_size": 8, "bos_token_id": None, "eos_token_id": None}
    small = Qwen3Config(**{k: v for k, v in BASE_CONFIG.items() if k != "architectures"} | less)
    model = Qwen3ForCausalLM(small)
    model.name_or_path = f"Qwen/{BASE}"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=MODULES, init_lora_weights=False, task_type="CAUSAL_LM"))
    adapted.save_pretrained(at / ADAPTER, save_embedding_layers=False)
    return base, at / ADAPTER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("idlm", "risd"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=CONFIG["vocab_size"], help="less: the layers then have the share of a step that 36 have")
    args = parser.parse_args()
    {"idlm": write_idlm, "risd": write_risd}[args.kind](args.directory, args.layers, args.vocab)


if __name__ == "__main__":
    main()
