"""What `idlm convert` was asked for: its flags, checked, in one frozen dataclass."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from idlm_sglang.config import MAX_STRIDE, SettingError, share, whole_number

AUTO = "auto"
DEVICES, PRECISIONS = (AUTO, "cpu", "cuda"), (AUTO, "float32", "bfloat16")
# Learning rates: the paper's for the whole model; for adapters nothing is published, and nothing was measured on real sizes.
FULL_RATE, ADAPTER_RATE = 1e-5, 2e-4

_DESCRIPTION = """\
Train a gated adapter (R-ISD) for an AR model of the Qwen3 family: LoRA that is active at the MASK rows alone. The base is
not changed, and served with the adapter it gives the output that it gives without. Serve it: idlm serve BASE --idlm-lora OUT

BASE is a directory or a repository's owner/name. FILE has one conversation in OpenAI's format per line:

  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

The answers (role assistant) are what is trained on. When a training was interrupted, the same command goes on."""

_EPILOG = """\
examples:
  idlm convert /models/Qwen3-8B --data chats.jsonl --out adapter                 an adapter of rank 128
  idlm convert /models/Qwen3-8B --data chats.jsonl --out adapter --self-distill  the answers written anew by the base first
  idlm convert /models/Qwen3-1.7B --data chats.jsonl --out idlm --full           the whole model, as published; another model then

exit code: 0 trained, 1 the training failed, 2 a mistake in the command or in FILE, 130 interrupted (what was trained is kept)."""


@dataclass(frozen=True)
class Plan:
    """Everything the training needs.

    Attributes:
        full: train the whole model instead of an adapter.
        rank, lora_alpha: of the adapter, whose output is scaled by lora_alpha / rank.
        steps, rows, length: optimizer steps, rows per step, tokens per row.
        blocks: MASK tokens per block, one size after the other for an equal part of the steps.
        soft: share of the loss against the base's distribution, the rest is against the label (adapter).
        clean_weight: alpha, the weight of the clean rows' loss, or None for CE_masked / CE_clean (full).
        mask_token: a token or an id, or None for what the base has.
        held_out: share of the conversations that is kept for the figures at the end.
        temperature: of the answers that `self_distill` writes; 0 is greedy.
    """

    base: str
    data: Path
    out: Path
    full: bool
    rank: int
    lora_alpha: int
    steps: int
    rows: int
    length: int
    learning_rate: float
    blocks: tuple[int, ...]
    soft: float
    clean_weight: float | None
    mask_token: str | None
    held_out: float
    self_distill: bool
    temperature: float
    seed: int
    save_every: int
    device: str
    precision: str
    tflops: float | None


def parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    made = kind(prog="idlm convert", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=style, allow_abbrev=False)
    option = made.add_argument
    option("base", metavar="BASE", help="the AR model")
    option("--data", metavar="FILE", required=True, help="conversations, JSONL")
    option("--out", metavar="OUT", required=True, help="directory for the adapter, or with --full for the model")
    option("--full", action="store_true", help="train the whole model on a masked and a clean copy, as published: no longer the base's output")
    option("--self-distill", action="store_true", help="let the base write the answers anew first (OUT/answers.jsonl)")
    option("--temperature", metavar="T", default="0", help="of those answers (default 0: greedy)")
    option("--rank", metavar="R", default="128", help="of the adapter (default 128, as the published one)")
    option("--lora-alpha", metavar="A", help="the adapter is scaled by A / R (default R)")
    option("--steps", metavar="N", default="1000", help="optimizer steps (default 1000)")
    option("--rows", metavar="N", default="8", help="rows per step (default 8)")
    option("--length", metavar="N", default="1024", help="tokens per row; longer conversations are cut (default 1024)")
    option("--learning-rate", metavar="X", help=f"AdamW (default {ADAPTER_RATE:g}, with --full {FULL_RATE:g}; not tuned on real sizes)")
    option("--blocks", metavar="K,...", default="1,2,3", help="MASK tokens per block, one size after the other; K serves stride K + 1 (default 1,2,3)")
    option("--soft", metavar="SHARE", default="0.5", help="share of the loss against the base's distribution, the rest against the label (default 0.5)")
    option("--clean-weight", metavar="ALPHA", help="with --full: weight of the clean rows' loss, or auto for CE_masked / CE_clean (default auto)")
    option("--mask-token", metavar="TOKEN", help="a token of the vocabulary or an id (default: the base's MASK, else a spare row of its embedding)")
    option("--held-out", metavar="SHARE", default="0.05", help="share of the conversations kept for the figures at the end (default 0.05)")
    option("--seed", metavar="N", default="0", help="of everything random (default 0)")
    option("--save-every", metavar="N", default="100", help="steps between two states to go on from (default 100)")
    option("--device", metavar="DEVICE", default=AUTO, help="cpu or cuda (default: cuda where there is one)")
    option("--precision", metavar="TYPE", default=AUTO, help="float32 or bfloat16 (default: bfloat16 on cuda)")
    option("--tflops", metavar="X", help="the device's dense bf16 TFLOP/s, for the estimate of the time where it is not known")
    return made


def resolve(own: argparse.Namespace) -> Plan:
    """The plan of a parsed command line; :class:`SettingError` for what cannot be trained. Reads no file."""
    def number(name: str, low: int, high: int | None = None) -> int:
        text = getattr(own, name)
        return whole_number(f"--{name.replace('_', '-')} {text}", text, low, high)

    if own.clean_weight is not None and not own.full:
        raise SettingError(f"--clean-weight {own.clean_weight}: the clean rows of a frozen base are not trained; allowed: with --full")
    weight = None if own.clean_weight in (None, AUTO) else _real(f"--clean-weight {own.clean_weight}", own.clean_weight, 0.0, f"a number >= 0, or {AUTO}")
    for name, allowed in ("device", DEVICES), ("precision", PRECISIONS):
        if getattr(own, name) not in allowed:
            raise SettingError(f"--{name} {getattr(own, name)} is not known; allowed: {', '.join(allowed)}")
    rank = number("rank", 1)
    rate = own.learning_rate or str(FULL_RATE if own.full else ADAPTER_RATE)
    held_out = share(f"--held-out {own.held_out}", own.held_out)
    if not 0 < held_out < 1:
        raise SettingError(f"--held-out {own.held_out}: both parts need conversations; allowed: a share between 0 and 1")
    return Plan(
        base=own.base, data=Path(own.data), out=Path(own.out), full=own.full, rank=rank,
        lora_alpha=rank if own.lora_alpha is None else number("lora_alpha", 1),
        steps=number("steps", 1), rows=number("rows", 1), length=number("length", 8),
        learning_rate=_real(f"--learning-rate {rate}", rate, 0.0, "a number > 0", above=True),
        blocks=tuple(whole_number(f"--blocks {own.blocks}", word, 1, MAX_STRIDE - 1) for word in own.blocks.split(",")),
        soft=share(f"--soft {own.soft}", own.soft), clean_weight=weight, mask_token=own.mask_token, held_out=held_out,
        self_distill=own.self_distill, temperature=_real(f"--temperature {own.temperature}", own.temperature, 0.0, "a number >= 0"),
        seed=number("seed", 0), save_every=number("save_every", 1), device=own.device, precision=own.precision,
        tflops=None if own.tflops is None else _real(f"--tflops {own.tflops}", own.tflops, 0.0, "a number > 0", above=True),
    )


def _real(shown: str, text: str, low: float, allowed: str, above: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < low or (above and value == low):
        raise SettingError(f"{shown} is not valid; allowed: {allowed}")
    return value
