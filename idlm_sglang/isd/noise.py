"""Counter-based noise keyed by (seed, position, stream, token id).

The noise of a token does not depend on the batch, the stride, the order of arrival or the rank of the token among
its competitors: this is what makes seeded text the same at any stride, and random draws agree across TP ranks.

The generator is a keyed integer hash (two rounds of a 32-bit finaliser with full avalanche over two 32-bit keys per
row). Arithmetic runs in int64 with 32-bit masks, so that CPU and GPU give the same bits.
"""

import torch

# One stream per use: draws of different use at one position must be independent of each other.
STREAM_TOKEN = 0  # the token choice of a row (coupled rule), and every draft
STREAM_ACCEPT = 1  # the acceptance draw of the rejection rule
STREAM_FINAL = 2  # correction or bonus of the rejection rule

_MASK32 = 0xFFFFFFFF


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijective 32-bit finaliser on int64 tensors that hold 32-bit values."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def _row_keys(seeds: torch.Tensor, positions: torch.Tensor, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two 32-bit keys per row from 64-bit seeds ``(B,)`` and positions ``(B, R)``; both ``(B, R)`` int64."""
    low = (seeds & _MASK32)[:, None]
    high = ((seeds >> 32) & _MASK32)[:, None]
    place = (positions.to(torch.int64) * 4 + stream) & _MASK32
    first = _mix(_mix(low ^ 0x9E3779B9) ^ _mix(place))
    second = _mix(_mix(high ^ 0x85EBCA6B) + _mix(place ^ 0xC2B2AE35) & _MASK32)
    return _mix(first ^ second), _mix((second + low * 0x27D4EB2F) & _MASK32)


def _unit(bits: torch.Tensor) -> torch.Tensor:
    """32-bit integers to float32 in (0, 1); small values keep their full relative precision."""
    return ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=1.0 - 2.0**-24)


def uniform(seeds: torch.Tensor, positions: torch.Tensor, stream: int = STREAM_ACCEPT) -> torch.Tensor:
    """``(B, R)`` float32 uniform on (0, 1), one per row. ``seeds`` ``(B,)`` int64, ``positions`` ``(B, R)`` int."""
    first, second = _row_keys(seeds, positions, stream)
    return _unit(_mix(first ^ second))


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, vocab: int, stream: int = STREAM_TOKEN) -> torch.Tensor:
    """Standard Gumbel noise, one per row and token id.

    ``argmax(log p + g)`` over the vocabulary is then a draw from p (the Gumbel-max identity).

    Args:
        seeds: ``(B,)`` int64.
        positions: ``(B, R)`` integer positions of the rows.
        vocab: vocabulary size ``V``.
        stream: which independent family of draws.

    Returns:
        ``(B, R, V)`` float32.
    """
    first, second = _row_keys(seeds, positions, stream)
    token = (torch.arange(vocab, device=seeds.device, dtype=torch.int64) * 0x9E3779B1) & _MASK32
    bits = _mix(_mix(token ^ first[..., None]) ^ second[..., None])
    # u is the exponential's survival value: small u gives large noise, where float32 is finest.
    return -torch.log(-torch.log1p(-_unit(bits)))
