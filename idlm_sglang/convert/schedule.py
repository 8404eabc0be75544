"""How the learning rate and the block size go over a training."""

import math
from collections.abc import Sequence

WARMUP_STEPS = 40


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, flat, then linear to zero over the second half."""
    warmup = min(1.0, (step + 1) / min(WARMUP_STEPS, max(1, steps // 4)))
    return warmup * min(1.0, 2 * (1 - step / steps))


def cosine_factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero, as published."""
    return min(1.0, (step + 1) / min(WARMUP_STEPS, max(1, steps // 4))) * (1 + math.cos(math.pi * step / steps)) / 2


def block_size(step: int, steps: int, sizes: Sequence[int]) -> int:
    """MASK tokens per block at this step: the sizes one after the other, each for an equal part of the training."""
    return sizes[step * len(sizes) // steps]
