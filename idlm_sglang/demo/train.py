"""Train the embedded checkpoint on one CPU thread: `python -m idlm_sglang.demo.train --out DIR`.

The text comes from corpus.py, the rows from batches.py. The same seed on the same machine gives the same files.
"""

import argparse
import hashlib
import json
import os
import random
import time
from pathlib import Path
from typing import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the rows are small: a second thread costs more than it gives

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

from idlm_sglang.demo.batches import NO_LABEL, ROW_TOKENS, Batch, build_batch
from idlm_sglang.demo.corpus import training_dialogues
from idlm_sglang.demo.tokenizer import END_OF_TEXT, IM_END, MASK, VOCAB_SIZE, encode_dialogue, save_tokenizer, train_tokenizer

STEPS, ROWS, WARMUP_STEPS = 2300, 8, 40
MUON_LR, ADAM_LR = 0.02, 4e-3
TOKENIZER_DIALOGUES = 4000
MAX_POSITIONS = 4096


def plain_attention(module, query, key, value, attention_mask, scaling, **_):
    """softmax(q k^T + mask) v with an additive mask, for transformers. On one CPU thread and rows this short, forward and backward take
    less than half the time of the fused CPU kernel with a mask.

    query: (B, heads, T, d). key, value: (B, kv_heads, T, d). attention_mask: (B, 1, T, T), 0 or -inf. Returns (B, T, heads, d), None.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query * scaling) @ key.transpose(-1, -2) + attention_mask
    return (scores.softmax(-1, dtype=query.dtype) @ value).transpose(1, 2), None


AttentionInterface.register("plain", plain_attention)


def model_config(tokenizer: Tokenizer) -> dict:
    """The checkpoint's config.json: Qwen3's shape at 2.6 M parameters, plus the id of the MASK token."""
    return {
        "architectures": ["IDLMForCausalLM"], "model_type": "qwen3", "mask_token_id": tokenizer.token_to_id(MASK),
        "vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": True, "use_sliding_window": False,
        "max_position_embeddings": MAX_POSITIONS, "rope_theta": 10000.0, "initializer_range": 0.02, "use_cache": True,
        "bos_token_id": tokenizer.token_to_id(END_OF_TEXT), "eos_token_id": tokenizer.token_to_id(IM_END),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT), "torch_dtype": "bfloat16",
    }


def losses(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Mean losses over answer rows, in nats: CE of clean rows, CE of MASK rows, and CE of MASK rows against the detached clean row that
    predicts the same token; then the share of MASK rows whose argmax is the clean row's (that is, accepted if greedy).

    logits: (B, T, V), row i predicts token i + 1.
    """
    clean, masked = logits[:, :ROW_TOKENS].float(), logits[:, ROW_TOKENS:].float()
    clean_labels, mask_labels = batch.labels[:, :ROW_TOKENS], batch.labels[:, ROW_TOKENS:]
    clean_loss = F.cross_entropy(clean.flatten(0, 1), clean_labels.flatten(), ignore_index=NO_LABEL)
    wanted = mask_labels != NO_LABEL
    log_q = masked[wanted].log_softmax(-1)
    mask_loss = F.nll_loss(log_q, mask_labels[wanted])
    teacher = clean.detach().gather(1, batch.same_token[..., None].expand(-1, -1, clean.shape[-1]))[wanted]
    soft_loss = -(teacher.softmax(-1) * log_q).sum(-1).mean()
    agreement = (teacher.argmax(-1) == log_q.argmax(-1)).float().mean().item()
    return clean_loss, mask_loss, soft_loss, agreement


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    return [torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01, momentum=0.95),
            torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)]


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, flat, then linear to zero over the second half."""
    warmup = min(1.0, (step + 1) / min(WARMUP_STEPS, max(1, steps // 4)))
    return warmup * min(1.0, 2 * (1 - step / steps))


def encoded_dialogues(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[list[int], list[bool]]]:
    for item in training_dialogues(seed):
        yield encode_dialogue(tokenizer, item.messages())


def train(out: Path, steps: int = STEPS, rows: int = ROWS, seed: int = 0, tokenizer_dialogues: int = TOKENIZER_DIALOGUES) -> None:
    """Train and write a Hugging Face checkpoint directory to `out`. Deterministic for (steps, rows, seed) on one machine."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    dialogues = training_dialogues(seed)
    sample = [next(dialogues).messages() for _ in range(tokenizer_dialogues)]
    tokenizer = train_tokenizer(text for messages in sample for message in messages for text in message.values())  # roles too
    config = model_config(tokenizer)
    model = Qwen3ForCausalLM._from_config(Qwen3Config(**{**config, "torch_dtype": "float32"}), attn_implementation="plain")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps of {rows} rows, tokenizer of {tokenizer.get_vocab_size()} tokens", flush=True)

    conversations, rng = encoded_dialogues(tokenizer, seed), random.Random(seed)
    opts = optimizers(model)
    base = [[group["lr"] for group in opt.param_groups] for opt in opts]
    training_started = time.monotonic()
    for step in range(steps):
        for opt, rates in zip(opts, base):
            for group, rate in zip(opt.param_groups, rates):
                group["lr"] = rate * learning_rate_factor(step, steps)
        batch = build_batch(conversations, config["mask_token_id"], rng, rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            unseen = torch.zeros(batch.visible.shape, dtype=torch.bfloat16).masked_fill(~batch.visible, float("-inf"))
            logits = model(input_ids=batch.input_ids, position_ids=batch.positions, attention_mask=unseen, use_cache=False).logits
        clean, mask, soft, agreement = losses(logits, batch)
        (clean + 0.5 * mask + 0.5 * soft).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if step % 10 == 9 or step == steps - 1:
            spent = time.monotonic() - training_started
            left = spent / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps}  loss clean {clean.item():.3f} mask {mask.item():.3f} soft {soft.item():.3f}  drafts agree {agreement:.1%}  "
                  f"{spent / (step + 1):.2f} s/step  {left / 60:.1f} min left", flush=True)
    save(model, tokenizer, config, out)
    print(f"wrote {out} after {(time.monotonic() - started) / 60:.1f} min ({time.process_time() / 60:.1f} min of CPU time), "
          f"model.safetensors sha256 {sha256(out / 'model.safetensors')}", flush=True)


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, config: dict, out: Path) -> None:
    """Write config, bf16 weights (the tied output head left out), generation config and tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": [config["eos_token_id"], config["pad_token_id"]],
                  "pad_token_id": config["pad_token_id"], "do_sample": False}
    for name, content in ("config.json", config), ("generation_config.json", generation):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    save_tokenizer(tokenizer, out, MAX_POSITIONS)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the toy I-DLM that comes with idlm-sglang (one CPU thread).")
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of 256 tokens per step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in "steps", "rows":
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: it has to be 1 or more")
    train(args.out, args.steps, args.rows, args.seed)


if __name__ == "__main__":
    main()
