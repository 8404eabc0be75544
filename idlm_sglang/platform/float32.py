"""float32 on a GPU, in which SGLang 0.5.23 does not compute unasked. Imports no SGLang."""

import os

import torch

# sgl_kernel's RMSNorm has half precisions only: SGLang's switch for its fused ops takes those of torch. And Triton multiplies float32 tiles
# in TF32, with the 10 bits of a half's mantissa, so that the same token by a decode and by a verify forward would not be the same.
_ENVIRON = {"SGLANG_FORCE_FUSED_OP_BACKEND": "torch", "TRITON_F32_DEFAULT": "ieee"}
# FA3, SGLang's own choice for a Hopper, and FlashInfer have half precisions only.
ATTENTION = "triton"


def in_float32(dtype: str | None) -> bool:
    """Whether a server with this ``--dtype`` computes in float32 on a GPU."""
    return dtype in ("float32", "float") and torch.cuda.is_available()


def float32_environ(dtype: str | None) -> dict[str, str]:
    """What this process's environment lacks for such a server; what the user set stays. Empty for any other ``dtype``, and on a CPU."""
    return {name: value for name, value in _ENVIRON.items() if name not in os.environ} if in_float32(dtype) else {}
