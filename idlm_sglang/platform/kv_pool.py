"""The KV pool of the CPU platform: SGLang's own, without the Triton slot copy."""

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, move_kv_cache_native


class CpuMHATokenToKVPool(MHATokenToKVPool):
    """`MHATokenToKVPool` whose slot moves are torch indexing.

    The stock pool compiles and warms a Triton copy kernel whenever a speculative algorithm is on.
    """

    def _init_kv_copy_and_warmup(self) -> None:
        self._kv_copy_config = None

    def _move_kv_cache_impl(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Copy KV rows src_loc -> tgt_loc (both (n,) int) in every layer."""
        move_kv_cache_native(self.k_buffer, self.v_buffer, tgt_loc, src_loc)
