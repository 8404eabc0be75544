"""Mixtures of requests, and what the tests compare."""

from dataclasses import fields, replace

import torch

from idlm_kernels.rows import Rows, step_rows
from idlm_sglang.isd import SamplingRows
from tests.isd.reference import GREEDY, NEG, Params, sampling_rows

UNTRUNCATED = [Params(), GREEDY, Params(temperature=0.7, coupled=True), Params(temperature=3.0, coupled=True)]
TRUNCATED = [
    Params(temperature=1.3, top_k=5),
    Params(top_p=0.8, coupled=True),
    Params(min_p=0.1),
    Params(top_k=40, top_p=0.95, min_p=0.02, coupled=True),
    Params(temperature=3.0, top_p=0.3),
    Params(top_k=50, top_p=0.95),
]
MIXED = UNTRUNCATED + TRUNCATED


def moved(rows: SamplingRows, device: str) -> SamplingRows:
    tensors = {f.name: getattr(rows, f.name) for f in fields(rows)}
    return replace(rows, **{name: part.to(device) for name, part in tensors.items() if isinstance(part, torch.Tensor)})


def parameters(params: list[Params], device: str, seed: int = 0) -> SamplingRows:
    return moved(sampling_rows(params, torch.arange(len(params)) * 0x9E3779B97F4A7 - seed), device)


def random_logits(batch: int, width: int, vocab: int, seed: int, device: str, step: float = 0.0) -> torch.Tensor:
    """A few likely tokens over noise; ``step`` rounds to its multiples, which makes ties. One token is ruled out, as MASK is."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, width, vocab, generator=random) * 2.5
    logits = (logits / step).round() * step if step else logits
    logits[..., vocab // 2] = NEG
    return logits.to(device)


def rows_of(logits: torch.Tensor, counts: torch.Tensor, seq_lens: torch.Tensor, forks: torch.Tensor | None = None, **terms) -> Rows:
    k = (logits.shape[1] - 1) // 2
    return Rows(logits, *step_rows(counts, seq_lens, k, forks), **terms)


def packed(allowed: torch.Tensor) -> torch.Tensor:
    """``(B, W, V)`` bool to a packed int32 bitmask."""
    batch, width, vocab = allowed.shape
    words = -(-vocab // 32)
    padded = torch.zeros(batch, width, words * 32, dtype=torch.int64, device=allowed.device)
    padded[..., :vocab] = allowed
    bits = padded.view(batch, width, words, 32) << torch.arange(32, device=allowed.device)
    return bits.sum(-1).to(torch.int32)


def assert_same_draw(got: torch.Tensor, want: torch.Tensor, scores: torch.Tensor) -> int:
    """Equal tokens, but for draws whose two scores ``(B, R, V)`` are closer than their rounding. Returns how many those are."""
    differing = got != want
    near = (scores.gather(-1, got[..., None]) - scores.gather(-1, want[..., None]))[..., 0].abs()
    limit = scores.gather(-1, want[..., None])[..., 0].abs().clamp(min=1) * 2.0**-21
    assert bool((near[differing] <= limit[differing]).all()), f"{int(differing.sum())} tokens differ, by up to {near[differing].max()}"
    return int(differing.sum())
