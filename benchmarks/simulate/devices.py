"""Figures of GPUs from their makers' data sheets."""

from dataclasses import dataclass

BF16, FP8 = "bf16", "fp8"
DTYPES = (BF16, FP8)


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        bandwidth: bytes per second of its memory.
        flops: dense operations per second of its matrix units by dtype. Data sheets print them with sparsity: half of that.
        link: bytes per second to its neighbours, one direction.
        memory: bytes.
        source: the data sheet.
    """

    name: str
    bandwidth: float
    flops: dict[str, float]
    link: float
    memory: float
    source: str


_HOPPER = {BF16: 989e12, FP8: 1979e12}

DEVICES = {
    d.name: d
    for d in (
        Device("H100", 3.35e12, _HOPPER, 450e9, 80e9, "NVIDIA H100 Tensor Core GPU data sheet, SXM5"),
        Device("H200", 4.8e12, _HOPPER, 450e9, 141e9, "NVIDIA H200 Tensor Core GPU data sheet, SXM5"),
    )
}
