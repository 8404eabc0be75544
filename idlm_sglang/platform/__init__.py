"""Torch-only CPU platform for SGLang: chosen when the machine has no accelerator, and only then."""

import os

import torch

PLATFORM_CLASS = "idlm_sglang.platform.cpu:IdlmCpuPlatform"

# `musa` exists on `torch` only where torch_musa or torchada put it; `mps` and `npu` likewise vary with the build.
_ACCELERATORS = ("cuda", "xpu", "npu", "mps", "musa", "hpu")


def accelerator_available() -> bool:
    """True when any accelerator SGLang knows is usable. A broken driver counts as present: never hide it."""
    for name in _ACCELERATORS:
        is_available = getattr(getattr(torch, name, None), "is_available", None)
        if is_available is None:
            continue
        try:
            if is_available():
                return True
        except Exception:
            return True
    return False


def activate() -> str | None:
    """Entry point of `sglang.srt.platforms`: the platform class's path, or None to leave the machine to SGLang.

    None on any machine with an accelerator, and when `SGLANG_USE_CPU_ENGINE=1` asks for SGLang's own CPU
    engine. Never raises, and imports neither SGLang nor the platform class.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    return None if accelerator_available() else PLATFORM_CLASS
