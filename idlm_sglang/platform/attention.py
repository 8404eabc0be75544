"""The CPU platform's attention backend, registered under SGLang's own name `torch_native`."""

from contextlib import contextmanager

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from idlm_sglang.platform.tile_plan import Plan, make_parts, make_plan
from idlm_sglang.platform.tiled_attention import Workspace, attend_parts


class TiledAttnBackend(TorchNativeAttnBackend):
    """Prefill, decode, mixed and target-verify attention over the paged KV cache, batched.

    Layers with a sliding window, cross attention, an encoder or unequal K and V widths keep the stock code.
    """

    hides_new_columns = True  # a verify input's `new_visible` is heeded

    def __init__(self, model_runner) -> None:
        super().__init__(model_runner)
        self._workspace = Workspace()
        key_cache = self.token_to_kv_pool.get_key_buffer(self.token_to_kv_pool.start_layer)
        self._column_bytes = 2 * key_cache[0].nbytes
        # In bfloat16 sums in another order round to other bits often enough to change one answer in a hundred.
        self._one_order = model_runner.dtype == torch.bfloat16
        self._step: tuple[int, torch.Tensor | None] = 0, None

    @contextmanager
    def with_step(self, requests: int, new_visible: torch.Tensor | None):
        """In here the last ``requests`` of an extend are those of a decode step, with W rows each at most. They see of their own new columns what
        ``new_visible`` ``(requests, W, W)`` bool leaves of them; None hides nothing."""
        self._step = requests, new_visible
        try:
            yield
        finally:
            self._step = 0, None

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self.forward_metadata = None
        if not forward_batch.forward_mode.is_idle():
            self.forward_metadata = self._plan(forward_batch)

    # For `platform.calls`: each captured batch size has a list for its plan, which a replay fills before it runs.

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self._captured: dict[int, list[Plan]] = {}

    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False) -> None:
        if in_capture:
            self.forward_metadata = self._captured[forward_batch.batch_size] = []
        self._captured[forward_batch.batch_size][:] = self._plan(forward_batch)

    def _plan(self, forward_batch: ForwardBatch) -> list[Plan]:
        seq_lens, table = forward_batch.seq_lens, self.req_to_token_pool.req_to_token
        new_visible = None
        if forward_batch.forward_mode.is_decode():
            # seq_lens counts the new token; a padding request has 0.
            row_counts, prefix_lens = 1, (seq_lens - 1).clamp(min=0)
        elif forward_batch.forward_mode.is_target_verify():
            # seq_lens counts committed columns only. Every request brings the same number of new rows, or those that a layout says.
            row_counts, prefix_lens = forward_batch.spec_info.num_tokens_per_req, seq_lens
            layout = getattr(forward_batch.spec_info, "ragged_verify_layout", None)
            if layout is not None:
                row_counts = layout.verify_lens
            new_visible = getattr(forward_batch.spec_info, "new_visible", None)
            if new_visible is not None and new_visible.all():
                new_visible = None  # no request of this step is in a branch: the plain mask is cheaper
        else:
            prefix_lens, row_counts = forward_batch.extend_prefix_lens, forward_batch.extend_seq_lens
            on_host = forward_batch.extend_seq_lens_cpu
            if on_host is not None:
                step, visible = self._step
                return make_parts(table, forward_batch.req_pool_indices, prefix_lens, list(on_host), self._column_bytes, visible, self._one_order, step)
        return [make_plan(table, forward_batch.req_pool_indices, prefix_lens, row_counts, self._column_bytes, new_visible, self._one_order)]

    def forward_decode(self, q, k, v, layer: RadixAttention, forward_batch: ForwardBatch, save_kv_cache: bool = True):
        if not _is_plain_causal(layer):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_extend(self, q, k, v, layer: RadixAttention, forward_batch: ForwardBatch, save_kv_cache: bool = True):
        if not _is_plain_causal(layer):
            if forward_batch.forward_mode.is_target_verify():
                raise NotImplementedError("target verify on the CPU platform serves plain causal layers only")
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def _forward(self, q, k, v, layer: RadixAttention, forward_batch: ForwardBatch, save_kv_cache: bool):
        """q: (rows, q heads * dim); k, v: (rows, kv heads * dim) or None when another layer's cache is shared."""
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(
                layer, KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc), k, v
            )
        out = attend_parts(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            self.forward_metadata,
            self._workspace,
            layer.scaling,
        )
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)


def _is_plain_causal(layer: RadixAttention) -> bool:
    windowed = layer.sliding_window_size is not None and layer.sliding_window_size > -1
    return (
        layer.attn_type == AttentionType.DECODER
        and not layer.is_cross_attention
        and not windowed
        and layer.qk_head_dim == layer.v_head_dim
    )


def register() -> None:
    """Put the backend behind the name `torch_native`, which the rest of SGLang already treats as Triton-free."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend("torch_native")(TiledAttnBackend)
