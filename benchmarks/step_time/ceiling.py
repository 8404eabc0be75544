"""From step times to the speed-up that they allow.

speed-up(N, C) = TPF(N) x T_AR(C) / T_ISD(N, C): decode alone, every step full. Prefill, stops, ramps and waiting clients
come on top, so a real load stays below.
"""

from collections.abc import Mapping

# Tokens per forward of the published 8B checkpoint (IDLM, arXiv 2604.11035, and its authors' logs).
PUBLISHED_TPF = {2: 1.80, 3: 2.48, 4: 2.96, 8: 4.01}
# The constant acceptance that gives the published shares of verified, rejected and cold steps at N = 4.
PUBLISHED_ACCEPTANCE = 0.90


def tokens_per_forward(stride: int, acceptance: float) -> float:
    """TPF = (2 + p + .. + p^(N-2)) / (2 - p^(N-1)) for a constant acceptance p of every draft; 1 at N = 1."""
    if stride == 1:
        return 1.0
    return (2 + sum(acceptance**i for i in range(1, stride - 1))) / (2 - acceptance ** (stride - 1))


def acceptance_of(stride: int, tpf: float) -> float:
    """The constant acceptance that gives this TPF at stride N >= 2; 1 or 0 where none does."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_per_forward(stride, middle) < tpf else (low, middle)
    return (low + high) / 2


def speed_up(tpf: float, ar_ms: float, isd_ms: float) -> float:
    """TPF x T_AR / T_ISD."""
    return tpf * ar_ms / isd_ms


def best_stride(ceilings: Mapping[int, float]) -> tuple[int, float]:
    """The stride with the highest ceiling, and that ceiling; (0, 1.0) stands for AR where no stride is above it."""
    stride = max(ceilings, key=ceilings.__getitem__)
    return (stride, ceilings[stride]) if ceilings[stride] > 1 else (0, 1.0)
