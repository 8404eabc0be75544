"""float32 on a GPU, in which SGLang 0.5.23 does not compute unasked. Imports no SGLang."""

import os

import torch

# sgl_kernel's RMSNorm has half precisions only: SGLang's switch for its fused ops takes those of torch. And Triton multiplies float32 tiles
# in TF32, with the 10 bits of a half's mantissa, so that the same token by a decode and by a verify forward would not be the same.
_ENVIRON = {"SGLANG_FORCE_FUSED_OP_BACKEND": "torch", "TRITON_F32_DEFAULT": "ieee"}
NAMES = ("float32", "float")


def float32_environ(dtype: str | None) -> dict[str, str]:
    """What this process's environment lacks for a server that is to compute in ``dtype``, a value of SGLang's ``--dtype``; what the user set stays."""
    if dtype not in NAMES or not torch.cuda.is_available():
        return {}
    return {name: value for name, value in _ENVIRON.items() if name not in os.environ}
