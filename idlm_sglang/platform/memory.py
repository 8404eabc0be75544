"""How the C library hands out memory in a worker process."""

import ctypes
import sys

# A forward frees and allocates the same activations in every layer. Left alone, glibc gives blocks of this size back to the
# kernel at once, and each layer pages them in anew.
KEPT_BLOCK_BYTES = 64 << 20
KEPT_FREE_BYTES = 256 << 20

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Let this process keep up to KEPT_FREE_BYTES of freed memory for its next allocations. False where there is no glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES) and mallopt(_M_TRIM_THRESHOLD, KEPT_FREE_BYTES))
