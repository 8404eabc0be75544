"""Sizes, and inputs that look like a decode step's: peaked rows, drafts of which some stand."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.kernels.harness import Options
from idlm_sglang.demo import CHECKPOINT_DIR
from idlm_sglang.isd import SamplingRows, noise, step_positions, target_scores
from idlm_sglang.isd.tables import StepTables
from idlm_sglang.isd.target import host_flags

QWEN3_VOCAB = 151_936
BATCHES, STRIDES = (1, 8, 64), (2, 4, 8)
OFF = 1 << 30
MASK = 3
# Variant: temperature, top-k, top-p, min-p. "paper" is the sampling of the published scores.
SAMPLING = {
    "greedy": (1.0, 1, 1.0, 0.0),
    "temperature": (0.8, OFF, 1.0, 0.0),
    "top-p": (1.0, OFF, 0.95, 0.0),
    "min-p": (1.0, OFF, 1.0, 0.05),
    "paper": (1.0, 50, 0.95, 0.0),
}


@cache
def embedded_vocab() -> int:
    return json.loads((CHECKPOINT_DIR / "config.json").read_text())["vocab_size"]


@dataclass(frozen=True)
class Size:
    """Batch B, stride N, vocabulary V; K drafts, W rows per request."""

    vocab: int
    batch: int
    stride: int

    @property
    def k(self) -> int:
        return self.stride - 1

    @property
    def width(self) -> int:
        return 2 * self.stride - 1

    @property
    def cells(self) -> int:
        """Logits of one step."""
        return self.batch * self.width * self.vocab

    def dims(self, dtype: torch.dtype = torch.float32) -> dict[str, object]:
        return {"dtype": {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype], "vocab": self.vocab, "batch": self.batch, "stride": self.stride}


def sizes(options: Options) -> Iterator[Size]:
    if options.quick:
        yield from (Size(embedded_vocab(), batch, 4) for batch in (1, 8))
        return
    for vocab in (embedded_vocab(), QWEN3_VOCAB):
        yield from (Size(vocab, batch, stride) for batch in BATCHES for stride in STRIDES)


def peaked_logits(rows: tuple[int, ...], vocab: int, device: str) -> torch.Tensor:
    """``(*rows, V)`` float32, MASK removed: noise of deviation 2, and 20 tokens that stand 6 to 14 above it, as a language model's do."""
    logits = 2 * torch.randn(*rows, vocab)
    likely = torch.randint(4, vocab, (*rows, 20))
    logits.scatter_(-1, likely, 6 + 8 * torch.rand(*rows, 20))
    logits[..., MASK] = float("-inf")
    return logits.to(device)


def sampling_rows(variant: str, batch: int, device: str, coupled: bool = True) -> SamplingRows:
    """``batch`` requests that all sample as SAMPLING[variant] says."""
    temperature, top_k, top_p, min_p = SAMPLING[variant]
    sampled = top_k > 1
    return SamplingRows(
        temperature=torch.full((batch,), temperature, device=device),
        top_k=torch.full((batch,), top_k, dtype=torch.int32, device=device),
        top_p=torch.full((batch,), top_p, device=device),
        min_p=torch.full((batch,), min_p, device=device),
        seed=torch.arange(batch, device=device) * 0x9E3779B97F4A7 + 1,
        coupled=torch.full((batch,), coupled, device=device),
        any_sampled=sampled,
        any_rejection=sampled and not coupled,
        **host_flags([(top_k, top_p, min_p)]),
    )


@dataclass(frozen=True)
class Step:
    """The arguments of :func:`idlm_sglang.isd.isd_step` for a linear step."""

    logits: torch.Tensor
    drafts: torch.Tensor
    counts: torch.Tensor
    log_q: torch.Tensor
    q: torch.Tensor | None
    limits: torch.Tensor
    seq_lens: torch.Tensor
    rows: SamplingRows
    tables: StepTables

    @property
    def arguments(self) -> tuple:
        """All but the tables."""
        return self.logits, self.drafts, self.counts, self.log_q, self.q, self.limits, self.seq_lens, self.rows


def step_of(size: Size, variant: str, device: str, coupled: bool = True) -> Step:
    """One steady step: every request has K drafts, drawn from a q near its p with the verifying rows' noise."""
    k, batch = size.k, size.batch
    rows = sampling_rows(variant, batch, device, coupled)
    logits = peaked_logits((batch, size.width), size.vocab, device)
    near = logits[:, :k] + 0.7 * torch.randn(batch, k, size.vocab).to(device)
    scores = target_scores(near, rows)
    seq_lens = torch.arange(batch, device=device) * 37 + 100
    if rows.any_sampled:
        scores_and_noise = scores + noise.gumbel(rows.seed, step_positions(seq_lens, k), size.vocab)
        drafts = scores_and_noise.argmax(-1)
    else:
        drafts = scores.argmax(-1)
    log_q = scores.gather(-1, drafts[..., None]).squeeze(-1) if rows.any_sampled else torch.zeros(batch, k, device=device)
    full = torch.full((batch,), k, device=device)
    return Step(logits, drafts, full, log_q, scores.exp() if rows.any_rejection else None, full, seq_lens, rows, StepTables(k, device))
