"""Counter-based noise keyed by (seed, position, stream, token id).

The noise of a token does not depend on the batch, the stride, the order of arrival or the rank of the token among
its competitors: this is what makes seeded text the same at any stride, and random draws agree across TP ranks.

The generator is a keyed integer hash (two rounds of a 32-bit finaliser with full avalanche over two 32-bit keys per
row). Its arithmetic is that of 32-bit integers: in int64 with masks for the keys of a row, in wrapping int32 (NumPy's uint32 on a CPU) for the
row's V values. Multiplication gives the same low 32 bits either way, and so do CPU and GPU, whose logarithms may differ in the last bit.
"""

from functools import lru_cache

import numpy
import torch

# One stream per use: draws of different use at one position must be independent of each other.
STREAM_TOKEN = 0  # the token choice of a row (coupled rule), and every draft
STREAM_ACCEPT = 1  # the acceptance draw of the rejection rule
STREAM_FINAL = 2  # correction or bonus of the rejection rule

_MASK32 = 0xFFFFFFFF

# Values that a host makes at a time: what goes through a dozen passes stays in its caches.
BLOCK = 1 << 17


def _mix(x):
    """A bijective 32-bit finaliser on int64 tensors that hold 32-bit values."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def _wrapped(constant: int) -> int:
    """The int32 with the bits of a 32-bit constant."""
    return constant - (1 << 32) if constant >> 31 else constant


def _mix_wrapping(x: torch.Tensor) -> torch.Tensor:
    """:func:`_mix` on an int32 tensor, in place. Shifts of int32 bring the sign bit along, which is masked off."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_wrapped(0x7FEB352D))
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_wrapped(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _mix_unsigned(x: numpy.ndarray, shifted: numpy.ndarray) -> None:
    """:func:`_mix` on a uint32 array, in place; ``shifted``: room for as many."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        numpy.right_shift(x, shift, out=shifted)
        x ^= shifted
        x *= numpy.uint32(factor)
    numpy.right_shift(x, 16, out=shifted)
    x ^= shifted


def on_host(tensor: torch.Tensor) -> bool:
    """Whether NumPy can read it: a plain tensor in the host's memory."""
    return type(tensor) is torch.Tensor and tensor.device.type == "cpu"


def _row_keys(seeds: torch.Tensor, positions: torch.Tensor, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two 32-bit keys per row from 64-bit seeds ``(B,)`` and positions ``(B, R)``; both ``(B, R)`` int64."""
    low, high = seeds & _MASK32, (seeds >> 32) & _MASK32
    place = (positions.to(torch.int64) * 4 + stream) & _MASK32
    # The two halves of a stage are mixed together: on small batches the number of operations is the cost.
    own, other = _mix(torch.stack([low ^ 0x9E3779B9, high ^ 0x85EBCA6B]))[..., None]
    here, there = _mix(torch.stack([place, place ^ 0xC2B2AE35]))
    first, second = _mix(torch.stack([own ^ here, other + there & _MASK32]))
    return _mix(torch.stack([first ^ second, (second + low[:, None] * 0x27D4EB2F) & _MASK32]))


# Behind the lower and the upper half of a seed: what the first stage mixes in, and what it mixes into the place.
_SEED_HALVES, _PLACE_HALVES = (numpy.array(pair, dtype=numpy.uint32) for pair in ((0x9E3779B9, 0x85EBCA6B), (0, 0xC2B2AE35)))


def _row_keys_on_host(seeds: torch.Tensor, positions: torch.Tensor, stream: int) -> numpy.ndarray:
    """:func:`_row_keys` as ``(2, B, R)`` uint32, whose arithmetic wraps by itself. Seeds and places share their stage: a few integers
    each, where the number of operations is the cost."""
    low = seeds.numpy().astype(numpy.uint32)
    x = numpy.empty((2, len(low), positions.shape[1] + 1), dtype=numpy.uint32)
    x[0, :, 0], x[1, :, 0] = low, seeds.numpy() >> 32 & _MASK32
    x[:, :, 0] ^= _SEED_HALVES[:, None]
    x[:, :, 1:] = positions.numpy().astype(numpy.uint32) * numpy.uint32(4) + numpy.uint32(stream)
    x[:, :, 1:] ^= _PLACE_HALVES[:, None, None]
    _mix_unsigned(x, numpy.empty_like(x))
    (own, other), (here, there) = x[:, :, :1], x[:, :, 1:]
    x = numpy.stack([own ^ here, other + there])
    shifted = numpy.empty_like(x)
    _mix_unsigned(x, shifted)
    x[0] ^= x[1]
    x[1] += (low * numpy.uint32(0x27D4EB2F))[:, None]
    _mix_unsigned(x, shifted)
    return x


def _unit(bits: torch.Tensor) -> torch.Tensor:
    """32-bit integers to float32 in (0, 1); small values keep their full relative precision."""
    return bits.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1.0 - 2.0**-24)


def uniform(seeds: torch.Tensor, positions: torch.Tensor, stream: int = STREAM_ACCEPT) -> torch.Tensor:
    """``(B, R)`` float32 uniform on (0, 1), one per row. ``seeds`` ``(B,)`` int64, ``positions`` ``(B, R)`` int."""
    if on_host(seeds):
        first, second = _row_keys_on_host(seeds, positions, stream)
        _mix_unsigned(first := first ^ second, numpy.empty_like(first))
        return _unit(torch.from_numpy(first))
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
    # u is the exponential's survival value: small u gives large noise, where float32 is finest.
    if on_host(seeds):
        keys = _row_keys_on_host(seeds, positions, stream).reshape(2, -1)
        found, few = torch.empty(keys.shape[1], vocab), max(BLOCK // vocab, 1)
        for row in range(0, len(found), few):
            # torch's log1p is vectorised on a CPU in float64 alone.
            found[row : row + few] = _unit(_token_bits(*keys[:, row : row + few], vocab)).neg_().double().log1p_().neg_().float().log_().neg_()
        return found.view(*positions.shape, vocab)
    first, second = (key.to(torch.int32)[..., None] for key in _row_keys(seeds, positions, stream))
    token = torch.arange(vocab, device=seeds.device, dtype=torch.int32) * _wrapped(0x9E3779B1)
    bits = _mix_wrapping(_mix_wrapping(token ^ first).bitwise_xor_(second))
    return _unit(bits.to(torch.int64).bitwise_and_(_MASK32)).neg_().log1p_().neg_().log_().neg_()


@lru_cache(maxsize=1)
def _tokens(vocab: int) -> numpy.ndarray:
    return numpy.arange(vocab, dtype=numpy.uint32) * numpy.uint32(0x9E3779B1)


def _token_bits(first: numpy.ndarray, second: numpy.ndarray, vocab: int) -> torch.Tensor:
    """The V 32-bit values of each row as ``(B, R, V)`` uint32, from its keys ``(B, R)`` uint32."""
    x = _tokens(vocab) ^ first[..., None]
    shifted = numpy.empty_like(x)
    _mix_unsigned(x, shifted)
    x ^= second[..., None]
    _mix_unsigned(x, shifted)
    return torch.from_numpy(x)


class NoiseAhead:
    """Noise of requests that move on by one position at a time. On a CPU the operations on few values cost more than the values: where the
    same requests come again one position on, the noise of up to ``_AHEAD`` positions, of ``_VALUES`` values in all, is made at once."""

    _AHEAD, _VALUES = 8, 1 << 16

    def __init__(self):
        self._seeds, self._first = [], []
        self._noise = torch.empty(0, 0, 0)

    def of(self, seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
        """:func:`gumbel` of one row per request, ``(B, 1, V)``, not to be changed. ``seeds`` ``(B,)`` int64, ``positions`` ``(B,)`` integer."""
        if not on_host(seeds):
            return gumbel(seeds, positions[:, None], vocab)
        same = seeds.tolist() == self._seeds and vocab == self._noise.shape[2]
        steps = {position - first for position, first in zip(positions.tolist(), self._first)} if same else set()
        made, step = self._noise.shape[1], steps.pop() if len(steps) == 1 else -1
        if not 0 <= step < made:
            ahead = min(max(self._VALUES // (len(seeds) * vocab), 1), self._AHEAD) if step == made else 1
            self._seeds, self._first, step = seeds.tolist(), positions.tolist(), 0
            self._noise = gumbel(seeds, positions[:, None] + torch.arange(ahead), vocab)
        return self._noise[:, step : step + 1]
