"""What the tests of bfloat16 on a CPU need."""

import pytest
import torch


def _measured() -> bool:
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16")) and not found.get("amx_bf16")


same_bits = pytest.mark.skipif(not _measured(), reason="bits of bfloat16 are known for processors with AVX512_BF16 and without AMX")
