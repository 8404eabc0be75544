"""Keyed Gumbel noise inside kernels: the 32-bit hash of (seed, position, stream, token id) that `idlm_sglang.isd.noise` defines.

The bits are the same as there, on any device and at any block size. What follows them is float32: the same formula, with the device's
logarithm, so a noise value may differ from torch's in its last bits.
"""

import torch
import triton
import triton.language as tl

STREAM_TOKEN = tl.constexpr(0)
STREAM_ACCEPT = tl.constexpr(1)
STREAM_FINAL = tl.constexpr(2)

_MASK32 = 0xFFFFFFFF


@triton.jit
def mix(x):
    """A bijective 32-bit finaliser on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_keys(seed, position, stream: tl.constexpr):
    """Two uint32 keys of a row from an int64 seed and position (scalars or tensors)."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    place = ((position.to(tl.int64) * 4 + stream) & 0xFFFFFFFF).to(tl.uint32)
    first = mix(mix(low ^ 0x9E3779B9) ^ mix(place))
    second = mix(mix(high ^ 0x85EBCA6B) + mix(place ^ 0xC2B2AE35))
    return mix(first ^ second), mix(second + low * 0x27D4EB2F)


@triton.jit
def token_bits(first, second, tokens):
    """uint32 per token id of a row with those keys."""
    return mix(mix((tokens.to(tl.uint32) * 0x9E3779B1) ^ first) ^ second)


@triton.jit
def unit(bits):
    """uint32 to float32 in (0, 1)."""
    return tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)


@triton.jit
def unit_below(bits):
    """A float32 not above ``unit(bits)`` and within 2^-23 of it, without the slow integer conversion."""
    return ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def gumbel_of(bits):
    """-log(-log(1 - u)) of the bits; log(1 - u) with the rounding error of 1 - u divided out."""
    u = unit(bits)
    rest = 1.0 - u
    lost = 1.0 - rest
    survival = tl.where(lost == 0.0, u, -tl.log(rest) * (u / tl.where(lost == 0.0, 1.0, lost)))
    return -tl.log(survival)


@triton.jit
def uniform_of(seed, position, stream: tl.constexpr):
    """One uniform per row."""
    first, second = row_keys(seed, position, stream)
    return unit(mix(first ^ second))


@triton.jit
def _fill(seeds, positions, out, bits_out, rows, vocab, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    seed = tl.load(seeds + row // rows)
    first, second = row_keys(seed, tl.load(positions + row), STREAM)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bits = token_bits(first, second, tokens)
    place = row.to(tl.int64) * vocab + tokens
    tl.store(out + place, gumbel_of(bits), mask=tokens < vocab)
    tl.store(bits_out + place, bits.to(tl.int64), mask=tokens < vocab)


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, vocab: int, stream: int = 0, block: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise written out, for checks and benchmarks; the other kernels compute it where they need it.

    Args:
        seeds: ``(B,)`` int64; positions: ``(B, R)`` int64.

    Returns:
        ``(B, R, V)`` float32 noise and the int64 bits behind it.
    """
    batch, rows = positions.shape
    out = torch.empty(batch, rows, vocab, dtype=torch.float32, device=seeds.device)
    bits = torch.empty(batch, rows, vocab, dtype=torch.int64, device=seeds.device)
    _fill[(batch * rows, triton.cdiv(vocab, block))](seeds, positions.contiguous(), out, bits, rows, vocab, STREAM=stream, BLOCK=block, enable_fp_fusion=False)
    return out, bits


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def _keys(seeds: torch.Tensor, positions: torch.Tensor, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = (seeds & _MASK32)[:, None], ((seeds >> 32) & _MASK32)[:, None]
    place = (positions.long() * 4 + stream) & _MASK32
    first = _mixed(_mixed(low ^ 0x9E3779B9) ^ _mixed(place))
    second = _mixed((_mixed(high ^ 0x85EBCA6B) + _mixed(place ^ 0xC2B2AE35)) & _MASK32)
    return _mixed(first ^ second), _mixed((second + low * 0x27D4EB2F) & _MASK32)


def _unit(bits: torch.Tensor) -> torch.Tensor:
    return ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def uniform_reference(seeds: torch.Tensor, positions: torch.Tensor, stream: int = 1) -> torch.Tensor:
    """``(B, R)`` float32 in (0, 1)."""
    first, second = _keys(seeds, positions, stream)
    return _unit(_mixed(first ^ second))


def gumbel_reference(seeds: torch.Tensor, positions: torch.Tensor, vocab: int, stream: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`gumbel` in plain torch, in int64."""
    first, second = _keys(seeds, positions, stream)
    tokens = (torch.arange(vocab, device=seeds.device) * 0x9E3779B1) & _MASK32
    bits = _mixed(_mixed(tokens ^ first[..., None]) ^ second[..., None])
    return -torch.log(-torch.log1p(-_unit(bits))), bits
