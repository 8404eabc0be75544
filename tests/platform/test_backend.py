"""The backend inside SGLang's own types: forward modes, KV writes, and the name it is registered under."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.dflash_info import DFlashVerifyInput

from idlm_sglang.platform import accelerator_available, attention
from idlm_sglang.platform.attention import TiledAttnBackend
from idlm_sglang.platform.kv_pool import CpuMHATokenToKVPool
from tests.platform.reference import PagedBatch, naive_attention, paged_batch

pytestmark = pytest.mark.skipif(accelerator_available(), reason="SGLang's KV pool launches device kernels here")

MODES = {
    "decode": (ForwardMode.DECODE, [5, 0, 64, 200], [1] * 4),
    "extend": (ForwardMode.EXTEND, [0, 16, 100], [20, 130, 1]),
    "extend, one request": (ForwardMode.EXTEND, [48], [32]),
    "mixed": (ForwardMode.MIXED, [0, 30, 77], [60, 1, 1]),
    "verify": (ForwardMode.TARGET_VERIFY, [9, 0, 128], [7] * 3),
}


def _pool(batch: PagedBatch, pool_class: type = CpuMHATokenToKVPool):
    slots, kv_heads, dim = batch.k_cache.shape
    pool = pool_class(slots - 1, 1, batch.q.dtype, kv_heads, dim, 1, "cpu", False, enable_kv_cache_copy=True)
    pool.k_buffer[0].copy_(batch.k_cache)
    pool.v_buffer[0].copy_(batch.v_cache)
    return pool


def _runner(batch: PagedBatch):
    return SimpleNamespace(
        device="cpu",
        dtype=batch.q.dtype,
        req_to_token_pool=SimpleNamespace(req_to_token=batch.req_to_token),
        token_to_kv_pool=_pool(batch),
    )


def _forward_batch(mode: ForwardMode, batch: PagedBatch):
    """The fields SGLang fills for each mode: seq_lens count the new rows except in target verify."""
    seq_lens = batch.prefix_lens + batch.row_counts
    extend = mode in (ForwardMode.EXTEND, ForwardMode.MIXED)
    spec_info = None
    if mode.is_target_verify():
        seq_lens, width = batch.prefix_lens, int(batch.row_counts[0])
        spec_info = DFlashVerifyInput(draft_token=None, positions=None, draft_token_num=width)
    return SimpleNamespace(
        forward_mode=mode,
        req_pool_indices=batch.req_pool_indices,
        seq_lens=seq_lens,
        extend_prefix_lens=batch.prefix_lens.int() if extend else None,
        extend_seq_lens=batch.row_counts.int() if extend else None,
        extend_seq_lens_cpu=batch.row_counts.tolist() if extend else None,
        out_cache_loc=_new_slots(batch),
        encoder_lens=None,
        spec_info=spec_info,
    )


def _new_slots(batch: PagedBatch) -> torch.Tensor:
    return torch.cat(
        [
            batch.req_to_token[row, prefix : prefix + rows]
            for row, prefix, rows in zip(batch.req_pool_indices, batch.prefix_lens, batch.row_counts)
        ]
    ).long()


def _layer(batch: PagedBatch, **options) -> RadixAttention:
    _, q_heads, dim = batch.q.shape
    return RadixAttention(q_heads, dim, batch.scale, batch.k_cache.shape[1], layer_id=0, **options)


def _run(backend_class: type, mode: ForwardMode, batch: PagedBatch, layer: RadixAttention) -> torch.Tensor:
    """The new rows' K and V reach the cache through the backend only."""
    new = _new_slots(batch)
    k, v = batch.k_cache[new], batch.v_cache[new]
    runner = _runner(batch)
    for buffer in (runner.token_to_kv_pool.k_buffer[0], runner.token_to_kv_pool.v_buffer[0]):
        buffer[new] = float("nan")
    backend = backend_class(runner)
    forward_batch = _forward_batch(mode, batch)
    backend.init_forward_metadata(forward_batch)
    return backend.forward(batch.q.flatten(1), k, v, layer, forward_batch).view(batch.q.shape)


@pytest.mark.parametrize("kind", MODES)
def test_each_forward_mode_equals_the_definition(kind):
    mode, prefix, rows = MODES[kind]
    batch = paged_batch(prefix, rows)
    assert (_run(TiledAttnBackend, mode, batch, _layer(batch)).double() - naive_attention(batch)).abs().max() < 5e-6


@pytest.mark.parametrize("kind", [kind for kind in MODES if kind != "verify"])
def test_agrees_with_the_stock_backend(kind):
    mode, prefix, rows = MODES[kind]
    batch = paged_batch(prefix, rows)
    ours, stock = (_run(backend, mode, batch, _layer(batch)) for backend in (TiledAttnBackend, TorchNativeAttnBackend))
    torch.testing.assert_close(ours, stock, atol=5e-6, rtol=0)


@pytest.mark.parametrize("kind", ["decode", "extend"])
def test_sliding_window_layers_keep_the_stock_code(kind):
    mode, prefix, rows = MODES[kind]
    batch = paged_batch(prefix, rows)
    layer = _layer(batch, sliding_window_size=8)
    windowed = _run(TiledAttnBackend, mode, batch, layer)
    assert torch.equal(windowed, _run(TorchNativeAttnBackend, mode, batch, layer))
    assert (windowed.double() - naive_attention(batch)).abs().max() > 1e-2


def test_verify_refuses_a_sliding_window():
    mode, prefix, rows = MODES["verify"]
    batch = paged_batch(prefix, rows)
    with pytest.raises(NotImplementedError, match="plain causal layers only"):
        _run(TiledAttnBackend, mode, batch, _layer(batch, sliding_window_size=8))


def test_an_idle_batch_needs_no_plan():
    backend = TiledAttnBackend(_runner(paged_batch([4], [1])))
    backend.init_forward_metadata(SimpleNamespace(forward_mode=ForwardMode.IDLE, out_cache_loc=None))
    assert backend.forward_metadata is None


def test_registered_under_the_stock_name(monkeypatch):
    monkeypatch.setitem(ATTENTION_BACKENDS, "torch_native", ATTENTION_BACKENDS["torch_native"])
    attention.register()
    assert ATTENTION_BACKENDS["torch_native"] is TiledAttnBackend


def test_slot_moves_need_no_triton():
    """The stock pool of a speculative algorithm launches a Triton kernel as soon as it is built."""
    batch = paged_batch([20], [1])
    with pytest.raises(Exception, match="(?i)triton|driver|cuda"):
        _pool(batch, MHATokenToKVPool)
    pool = _pool(batch)
    pool.move_kv_cache(torch.tensor([1, 2]), torch.tensor([7, 9]))
    assert torch.equal(pool.k_buffer[0][[1, 2]], batch.k_cache[[7, 9]])
    assert torch.equal(pool.v_buffer[0][[1, 2]], batch.v_cache[[7, 9]])
