"""Gumbel noise of every row and token id: `isd.noise.gumbel`, keyed by (seed, position, token).

None of the fast alternatives has that key: `exponential_` and `rand` go by the order of calls, so a token's noise changes with the
batch and the stride. Two have it: one torch generator per row, seeded from (seed, position), and SGLang's own MurmurHash kernel with
float64 noise (Triton). The reference is the same hash on unbounded integers, one token at a time, so it is checked on some tokens only
and not timed.
"""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from benchmarks.kernels.harness import KERNEL, LIBRARY, OURS, REFERENCE, Arm, Case, Options
from benchmarks.kernels.inputs import Size, sizes
from idlm_sglang.isd import noise, step_positions

M = 0xFFFFFFFF
CHECKED = 16  # tokens per row
TINY = torch.finfo(torch.float32).tiny


def mixed(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & M
    x = ((x ^ (x >> 15)) * 0x846CA68B) & M
    return x ^ (x >> 16)


def gumbel_of(seed: int, position: int, token: int) -> float:
    """The documented hash in Python's integers, and -log(-log(1 - u)) in doubles."""
    low, high, place = seed & M, (seed >> 32) & M, (position * 4 + noise.STREAM_TOKEN) & M
    first = mixed(mixed(low ^ 0x9E3779B9) ^ mixed(place))
    second = mixed((mixed(high ^ 0x85EBCA6B) + mixed(place ^ 0xC2B2AE35)) & M)
    first, second = mixed(first ^ second), mixed((second + low * 0x27D4EB2F) & M)
    bits = mixed(mixed(((token * 0x9E3779B1) & M) ^ first) ^ second)
    # As the op: 32 bits in a float32. Near 1 that rounding shows in the noise.
    unit = float(np.float32(bits) + np.float32(0.5)) * 2.0**-32
    return -math.log(-math.log1p(-min(unit, 1 - 2.0**-24)))


def checked_tokens(vocab: int) -> list[int]:
    """The first and the last token and some between."""
    return sorted({round(i * (vocab - 1) / (CHECKED - 1)) for i in range(CHECKED)})


def by_token(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """``(B, R, CHECKED)`` float32 on the host."""
    return torch.tensor([[[gumbel_of(s, p, t) for t in checked_tokens(vocab)] for p in row] for s, row in zip(seeds.tolist(), positions.tolist())])


def check_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got[..., checked_tokens(got.shape[-1])].cpu(), want, rtol=1e-5, atol=1e-5)


def check_law(got: torch.Tensor, want: torch.Tensor) -> None:
    """A standard Gumbel variable has mean 0.5772 and variance pi^2 / 6; within five standard errors."""
    n = got.numel()
    mean, variance = got.double().mean().item(), got.double().var().item()
    assert abs(mean - 0.57722) < 5 * (1.645 / n) ** 0.5, f"mean {mean}"
    assert abs(variance - 1.64493) < 5 * (11.9 / n) ** 0.5, f"variance {variance}"


def by_generators(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """One torch generator per row, seeded from (seed, position)."""
    out = torch.empty(*positions.shape, vocab, device=positions.device)
    generator = torch.Generator(positions.device)
    for request, (seed, row) in enumerate(zip(seeds.tolist(), positions.tolist())):
        for i, position in enumerate(row):
            out[request, i].exponential_(generator=generator.manual_seed((seed * 0x9E3779B97F4A7C15 + position) % (1 << 63)))
    return out.log_().neg_()


def by_murmur(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """The noise of SGLang's seeded sampler."""
    from sglang.kernels.ops.sampling.murmur_hash import murmur_hash32

    rows = positions.shape[1]
    hashed = murmur_hash32(seeds.repeat_interleave(rows).to(torch.uint64), positions.flatten(), torch.arange(vocab, device=seeds.device))
    unit = hashed.to(torch.float64) / torch.iinfo(torch.uint32).max
    return unit.log_().clamp_(min=torch.finfo(torch.float64).min, max=-(2.0**-32)).neg_().log_().neg_().view(*positions.shape, vocab)


def by_kernel(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    from idlm_kernels.noise import gumbel

    return gumbel(seeds, positions, vocab)[0]


def arms_of(size: Size, options: Options) -> list[Arm]:
    seeds = torch.arange(size.batch, device=options.device) * 0x9E3779B97F4A7 + 1
    positions = step_positions(torch.arange(size.batch, device=options.device) * 37 + 100, size.width)
    shape = (size.batch, size.width, size.vocab)
    keyless = "no key"
    return [
        Arm("ours", OURS, lambda: noise.gumbel(seeds, positions, size.vocab), check_bits),
        Arm("Triton", KERNEL, lambda: by_kernel(seeds, positions, size.vocab), check_bits, needs_gpu=True, note="writes the bits, too"),
        Arm(f"hash, {CHECKED} tokens", REFERENCE, lambda: by_token(seeds, positions, size.vocab), timed=False),
        Arm("torch exponential_", LIBRARY, lambda: torch.empty(shape, device=options.device).exponential_().log_().neg_(), check_law, note=keyless),
        Arm("torch rand", LIBRARY, lambda: torch.rand(shape, device=options.device).clamp_min_(TINY).log_().neg_().log_().neg_(), check_law, note=keyless),
        Arm("torch, generator per row", LIBRARY, lambda: by_generators(seeds, positions, size.vocab), check_law, note="keyed; other bits on a GPU"),
        Arm("SGLang murmur", LIBRARY, lambda: by_murmur(seeds, positions, size.vocab), check_law, needs_gpu=True, note="keyed"),
    ]


def cases(options: Options) -> Iterator[Case]:
    for size in sizes(options):
        yield Case("gumbel", size.dims(), partial(arms_of, size, options), size.cells)
