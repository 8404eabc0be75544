"""Train the embedded checkpoint on one CPU thread: `python -m idlm_sglang.demo.train --out DIR`.

With `--ar-only` the same model is trained on clean rows alone: an ordinary AR checkpoint, the base of the embedded adapter.

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
from transformers import Qwen3Config, Qwen3ForCausalLM

from idlm_sglang.convert import attention
from idlm_sglang.convert.objective import draft_losses
from idlm_sglang.convert.rows import NO_LABEL, Batch
from idlm_sglang.convert.schedule import block_size, learning_rate_factor
from idlm_sglang.demo.batches import build_batch
from idlm_sglang.demo.corpus import training_dialogues
from idlm_sglang.demo.tokenizer import END_OF_TEXT, IM_END, MASK, VOCAB_SIZE, encode_dialogue, save_tokenizer, train_tokenizer

STEPS, AR_STEPS, ROWS = 7000, 800, 8
BLOCK_SIZES = 3, 7, 15, 15  # MASKs per block, each for a quarter of the training: strides 4, 8 and 16
MUON_LR, ADAM_LR = 0.02, 4e-3
TOKENIZER_DIALOGUES = 4000
MAX_POSITIONS = 4096


def model_config(tokenizer: Tokenizer, ar_only: bool = False) -> dict:
    """The checkpoint's config.json: Qwen3's shape at 2.6 M parameters, plus the id of the MASK token unless it is an AR model."""
    kind = {"architectures": ["Qwen3ForCausalLM"]} if ar_only else {"architectures": ["IDLMForCausalLM"], "mask_token_id": tokenizer.token_to_id(MASK), "block_size": max(BLOCK_SIZES)}
    return {
        **kind, "model_type": "qwen3",
        "vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": True, "use_sliding_window": False,
        "max_position_embeddings": MAX_POSITIONS, "rope_theta": 10000.0, "initializer_range": 0.02, "use_cache": True,
        "bos_token_id": tokenizer.token_to_id(END_OF_TEXT), "eos_token_id": tokenizer.token_to_id(IM_END),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT), "torch_dtype": "bfloat16",
    }


def losses(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, str]:
    """The loss of a batch in nats, and its parts as text: CE of clean rows, or where there are MASK rows twice that + 0.5 of either of their losses.

    logits: (B, T, V), row i predicts token i + 1.
    """
    clean, masked = logits[:, :batch.clean].float(), logits[:, batch.clean:].float()
    clean_labels, mask_labels = batch.labels[:, :batch.clean], batch.labels[:, batch.clean:]
    clean_loss = F.cross_entropy(clean.flatten(0, 1), clean_labels.flatten(), ignore_index=NO_LABEL)
    if not masked.shape[1]:
        return clean_loss, f"clean {clean_loss.item():.3f}"
    wanted = mask_labels != NO_LABEL
    teacher = clean.detach().gather(1, batch.same_token[..., None].expand(-1, -1, clean.shape[-1]))[wanted]
    hard, soft, agreement = draft_losses(masked[wanted], teacher, mask_labels[wanted])
    return 2 * clean_loss + 0.5 * hard + 0.5 * soft, f"clean {clean_loss.item():.3f} mask {hard.item():.3f} soft {soft.item():.3f}  drafts agree {agreement:.1%}"


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    return [torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01, momentum=0.95),
            torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)]


def encoded_dialogues(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[list[int], list[bool]]]:
    for item in training_dialogues(seed):
        yield encode_dialogue(tokenizer, item.messages())


def train(out: Path, steps: int = STEPS, rows: int = ROWS, seed: int = 0, ar_only: bool = False) -> None:
    """Train and write a Hugging Face checkpoint directory to `out`. Deterministic for its arguments on one machine."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    dialogues = training_dialogues(seed)
    sample = [next(dialogues).messages() for _ in range(TOKENIZER_DIALOGUES)]
    tokenizer = train_tokenizer(text for messages in sample for message in messages for text in message.values())  # roles too
    config = model_config(tokenizer, ar_only)
    model = Qwen3ForCausalLM._from_config(Qwen3Config(**{**config, "torch_dtype": "float32"}), attn_implementation=attention.NAME)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps of {rows} rows, tokenizer of {tokenizer.get_vocab_size()} tokens", flush=True)

    conversations, rng = encoded_dialogues(tokenizer, seed), random.Random(seed)
    opts = optimizers(model)
    base = [[group["lr"] for group in opt.param_groups] for opt in opts]
    training_started = time.monotonic()
    for step in range(steps):
        for opt, rates in zip(opts, base):
            for group, rate in zip(opt.param_groups, rates):
                group["lr"] = rate * learning_rate_factor(step, steps)
        batch = build_batch(conversations, tokenizer.token_to_id(MASK), rng, rows, block_size(step, steps, BLOCK_SIZES))
        batch = batch.without_masks() if ar_only else batch
        with torch.autocast("cpu", dtype=torch.bfloat16):
            unseen = batch.unseen(torch.bfloat16)
            logits = model(input_ids=batch.input_ids, position_ids=batch.positions, attention_mask=unseen, use_cache=False).logits
        loss, parts = losses(logits, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if step % 10 == 9 or step == steps - 1:
            spent = time.monotonic() - training_started
            left = spent / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps}  loss {parts}  "
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
    parser = argparse.ArgumentParser(description="Train the toy models that come with idlm-sglang (one CPU thread).")
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--ar-only", action="store_true", help="clean rows alone: an ordinary AR checkpoint, without MASK in its config")
    parser.add_argument("--steps", type=int, help=f"default {STEPS}, with --ar-only {AR_STEPS}")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of 256 tokens per step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps is None:
        args.steps = AR_STEPS if args.ar_only else STEPS
    for name in "steps", "rows":
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: it has to be 1 or more")
    train(args.out, args.steps, args.rows, args.seed, args.ar_only)


if __name__ == "__main__":
    main()
