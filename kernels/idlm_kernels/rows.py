"""What the kernels are told of a step's logits rows, and how they read them."""

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl

# A row's sum of exponentials is taken block by block and added up in the order of the blocks. With another block or number of warps
# it rounds differently, and the edge of a nucleus could move with the batch: the two are the same at every batch size.
BLOCK = 2048
WARPS = 8
# A product and a sum stay two roundings, so that variants of a kernel (with a bias, with a bitmask) give a token the same score.
EXACT = {"enable_fp_fusion": False}


class Sampling(Protocol):
    """Sampling parameters of ``B`` requests; `idlm_sglang.isd.target.SamplingRows` is one.

    ``temperature``, ``top_p``, ``min_p`` ``(B,)`` float32; ``top_k`` ``(B,)`` int32, greedy where <= 1; ``seed`` ``(B,)`` int64;
    ``coupled`` ``(B,)`` bool; ``any_truncated`` and ``any_rejection`` on the host.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    coupled: torch.Tensor
    any_truncated: bool
    any_rejection: bool


@dataclass(frozen=True)
class Rows:
    """Logits rows and which of them are read.

    Attributes:
        logits: ``(B, W, V)`` float32 or bfloat16, unit stride along V. Penalties are added and MASK is removed already.
        index: ``(B, R)`` int64, the row behind each of R columns, -1 for none. Other rows are not touched.
        positions: ``(B, R)`` int64, the position that keys a row's noise.
        bias: ``(B, V)`` float32 added to every row of a request, or None.
        bitmask: ``(B, W, ceil(V / 32))`` int32, bit ``v % 32`` of word ``v // 32`` set where token v is allowed, or None.
    """

    logits: torch.Tensor
    index: torch.Tensor
    positions: torch.Tensor
    bias: torch.Tensor | None = None
    bitmask: torch.Tensor | None = None

    def __post_init__(self):
        batch, width, vocab = self.logits.shape
        if self.logits.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"logits of {self.logits.dtype}; allowed: float32, bfloat16")
        if self.logits.stride(2) != 1:
            raise ValueError(f"logits with stride {self.logits.stride(2)} along the vocabulary; allowed: 1")
        if self.index.shape != self.positions.shape or len(self.index) != batch:
            raise ValueError(f"index {tuple(self.index.shape)} and positions {tuple(self.positions.shape)}; allowed: both ({batch}, R)")
        words = (batch, width, triton.cdiv(vocab, 32))
        for name, part, shape, dtype in (("bias", self.bias, (batch, vocab), torch.float32), ("bitmask", self.bitmask, words, torch.int32)):
            if part is not None and (part.shape != shape or part.dtype != dtype or not part.is_contiguous()):
                raise ValueError(f"{name} {tuple(part.shape)} of {part.dtype}; allowed: {shape} of {dtype}, contiguous")
        for name in ("index", "positions"):
            part = getattr(self, name)
            if part.dtype != torch.int64 or not part.is_contiguous():
                raise ValueError(f"{name} of {part.dtype}; allowed: int64, contiguous")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, W, R, V)."""
        batch, width, vocab = self.logits.shape
        return batch, width, self.index.shape[1], vocab

    @property
    def pointers(self) -> tuple:
        """As the kernels take them: logits, its two strides, bias, bitmask, width, vocabulary."""
        _, width, _, vocab = self.shape
        return self.logits, self.logits.stride(0), self.logits.stride(1), self.bias, self.bitmask, width, vocab

    def read(self) -> torch.Tensor:
        """``(B, R, V)`` float32 with bias and bitmask applied, -inf in columns without a row: the kernels' view, in plain torch."""
        _, _, _, vocab = self.shape
        number = self.index.clamp(min=0)[..., None]
        x = self.logits.gather(1, number.expand(-1, -1, vocab)).float()
        if self.bitmask is not None:
            tokens = torch.arange(vocab, device=x.device)
            words = self.bitmask.gather(1, number.expand(-1, -1, self.bitmask.shape[-1]))[..., tokens // 32]
            x = x.masked_fill((words >> (tokens % 32)) & 1 == 0, float("-inf"))
        if self.bias is not None:
            x = x + self.bias[:, None]
        return x.masked_fill((self.index < 0)[..., None], float("-inf"))


def step_rows(counts: torch.Tensor, seq_lens: torch.Tensor, k: int, forks: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and positions, both ``(B, 2K + 1)`` int64, of a step with ``counts`` drafts behind ``seq_lens`` tokens (both ``(B,)``).

    Rows 0..c verify, rows c + 1..c + K propose; the padding behind them is not read. ``forks`` ``(B,)`` is how many drafts the proposing rows
    saw (`isd.layout`); all of them without it.
    """
    row = torch.arange(2 * k + 1, device=counts.device)
    counts = counts.long()[:, None]
    back = 0 if forks is None else counts - forks.long()[:, None]
    return torch.where(row <= counts + k, row, -1), seq_lens.long()[:, None] + torch.where(row > counts, row - back, row)


def plain_rows(first_positions: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and positions, both ``(B, rows)`` int64, of rows that are all read, at consecutive positions from ``first_positions`` ``(B,)`` on."""
    row = torch.arange(rows, device=first_positions.device)
    positions = first_positions.long()[:, None] + row
    return row.expand_as(positions).contiguous(), positions


@triton.jit
def row_start(logits, stride_b, stride_w, bias, bitmask, width, vocab, request, number):
    """Pointers to one row of the logits, its bias and its bitmask. 448 rows of 151,936 fit 32 bits; a larger batch would not."""
    at = logits + request.to(tl.int64) * stride_b + number.to(tl.int64) * stride_w
    if bias is not None:
        bias += request.to(tl.int64) * vocab
    if bitmask is not None:
        bitmask += (request.to(tl.int64) * width + number) * tl.cdiv(vocab, 32)
    return at, bias, bitmask


@triton.jit
def row_logits(at, bias, bitmask, tokens, inside):
    """float32 logits of ``tokens`` under bias and bitmask; -inf where not ``inside``."""
    x = tl.load(at + tokens, mask=inside, other=-float("inf")).to(tl.float32)
    if bitmask is not None:
        word = tl.load(bitmask + tokens // 32, mask=inside, other=0)
        x = tl.where(((word >> (tokens % 32)) & 1) != 0, x, -float("inf"))
    if bias is not None:
        x += tl.load(bias + tokens, mask=inside, other=0.0)
    return x


@triton.jit
def tempered(x, temperature):
    """x / T, correctly rounded: what torch computes, and without a product that one kernel would fuse and another would not."""
    return tl.math.div_rn(x, temperature)


@triton.jit
def finite(x):
    """A maximum to subtract: 0 for that of a row of -inf."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def sampling_of(request, temperature, top_k, top_p, min_p, vocab):
    """(temperature, 1 where greedy; greedy; truncated) of a request."""
    greedy = tl.load(top_k + request) <= 1
    cut = (tl.load(top_k + request) < vocab) | (tl.load(top_p + request) < 1.0) | (tl.load(min_p + request) > 0.0)
    return tl.where(greedy, 1.0, tl.load(temperature + request)), greedy, cut & (greedy == 0)
