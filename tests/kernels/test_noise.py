"""The noise inside kernels is the noise of `isd.noise`."""

import pytest
import torch

from idlm_kernels import noise as kernels
from idlm_sglang.isd import noise

SEEDS = torch.tensor([0, 1, -5, 2**62, -(2**63), 2**53 - 1])
POSITIONS = torch.tensor([[0, 1], [5000, 17], [2**31 + 3, 2**33], [7, 8], [100, 99], [131_071, 1]])


@pytest.mark.parametrize("stream", [noise.STREAM_TOKEN, noise.STREAM_FINAL])
def test_bits_are_equal_and_values_differ_by_rounding_only(stream, device):
    got, bits = kernels.gumbel(SEEDS.to(device), POSITIONS.to(device), 1_031, stream)
    wanted, wanted_bits = kernels.gumbel_reference(SEEDS.to(device), POSITIONS.to(device), 1_031, stream)
    assert torch.equal(bits, wanted_bits)
    # On a CPU its logarithms are those of float64.
    torch.testing.assert_close(wanted.cpu(), noise.gumbel(SEEDS, POSITIONS, 1_031, stream), rtol=1e-6, atol=1e-6)
    error = ((got - wanted).abs() / wanted.abs().clamp(min=1)).max().item()
    print(f"stream {stream}: {bits.numel()} values, {int((got != wanted).sum())} differ, by at most {error:.1e}")
    assert error < 1e-6


def test_streams_and_positions_give_other_noise(device):
    of = lambda position, stream: kernels.gumbel(SEEDS[:1].to(device), torch.tensor([[position]], device=device), 64, stream)[1]
    base = of(5, 0)
    assert not torch.equal(base, of(5, 2)) and not torch.equal(base, of(6, 0))


def test_the_uniforms_are_those_of_the_reference():
    assert torch.equal(kernels.uniform_reference(SEEDS, POSITIONS), noise.uniform(SEEDS, POSITIONS))
