"""Attention of the CPU platform beside SGLang's stock `torch_native` backend: same pool, same rows, one process.

One call is the attention of one forward: metadata once, then LAYERS layers (KV write, gather, softmax). The verify rows at width W run
the stock arm as an extend of W rows, which recomputes the prefix: it is left out above STOCK_VERIFY_COLUMNS, and cases above
LARGEST_VERIFY altogether. The reference goes request by request in plain torch, for the correctness gate only, and is not timed. A context
`64..2048` means lengths drawn uniformly from that range. On a GPU attention is SGLang's own, and there is nothing of ours to measure.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the platform sets it for a server

import torch

from benchmarks.kernels.harness import LIBRARY, OURS, REFERENCE, Arm, Options
from benchmarks.kernels.harness import Case as Measured

LAYERS = 4
# (query heads, KV heads, head dim, layers with their own KV): the embedded model, and Qwen3-8B's heads.
SHAPES = {"demo": (4, 2, 64, 4), "8b": (32, 8, 128, 1)}
BATCHES, CONTEXTS, WIDTHS = (1, 8, 64), (128, 2048), (3, 7, 15)
STOCK_VERIFY_COLUMNS = 4096
LARGEST_VERIFY = 8_000_000  # scores of one layer; above it a call takes seconds


class Pool:
    """KV buffers with the calls the two backends make; layers share buffers when there are fewer of those."""

    start_layer = 0

    def __init__(self, slots: int, kv_heads: int, dim: int, dtype: torch.dtype, buffers: int):
        self._k = [torch.randn(slots, kv_heads, dim).to(dtype) for _ in range(buffers)]
        self._v = [torch.randn(slots, kv_heads, dim).to(dtype) for _ in range(buffers)]

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self._k[layer_id % len(self._k)]

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self._v[layer_id % len(self._v)]

    def set_kv_buffer(self, layer, loc_info, k: torch.Tensor, v: torch.Tensor) -> None:
        self.get_key_buffer(layer.layer_id)[loc_info.loc] = k
        self.get_value_buffer(layer.layer_id)[loc_info.loc] = v


@dataclass(frozen=True)
class Case:
    mode: str  # decode, verify, extend
    shape: str
    dtype: torch.dtype
    batch: int
    context: int  # columns before the new rows
    spread: bool  # lengths uniform in 64..context instead of all equal
    rows: int  # new rows per request

    @property
    def dims(self) -> dict[str, object]:
        context = f"64..{self.context}" if self.spread else str(self.context)
        dtype = "fp32" if self.dtype == torch.float32 else "bf16"
        return {"shape": self.shape, "dtype": dtype, "batch": self.batch, "context": context, "rows": self.rows}


def forward_batches(case: Case, req_to_token: torch.Tensor) -> tuple[SimpleNamespace, SimpleNamespace]:
    """The same rows as (ours, stock) see them."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    draw = random.Random(0)
    shortest = min(64, case.context) if case.spread else case.context
    prefix = [draw.randint(shortest, case.context) for _ in range(case.batch)]
    prefix_lens = torch.tensor(prefix, dtype=torch.int64)
    rows = torch.full((case.batch,), case.rows, dtype=torch.int32)
    columns = prefix_lens[:, None] + torch.arange(case.rows)
    shared = dict(
        req_pool_indices=torch.arange(1, case.batch + 1),
        out_cache_loc=torch.gather(req_to_token[1 : case.batch + 1].long(), 1, columns).flatten(),
        encoder_lens=None,
        extend_prefix_lens=prefix_lens.int(),
        extend_seq_lens=rows,
        extend_seq_lens_cpu=rows.tolist(),
        spec_info=SimpleNamespace(num_tokens_per_req=case.rows),
    )
    stock_mode = ForwardMode.DECODE if case.mode == "decode" else ForwardMode.EXTEND
    stock = SimpleNamespace(forward_mode=stock_mode, seq_lens=prefix_lens + case.rows, **shared)
    if case.mode != "verify":
        return stock, stock
    return SimpleNamespace(forward_mode=ForwardMode.TARGET_VERIFY, seq_lens=prefix_lens, **shared), stock


def arms_of(case: Case) -> list[Arm]:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.layers.radix_attention import RadixAttention

    from idlm_sglang.platform.attention import TiledAttnBackend

    q_heads, kv_heads, dim, buffers = SHAPES[case.shape]
    columns = case.context + case.rows
    slots = case.batch * columns + 1
    req_to_token = torch.zeros(case.batch + 1, columns, dtype=torch.int32)
    req_to_token[1:] = (torch.randperm(slots - 1) + 1).view(case.batch, columns).int()
    runner = SimpleNamespace(
        device="cpu",
        dtype=case.dtype,
        req_to_token_pool=SimpleNamespace(req_to_token=req_to_token),
        token_to_kv_pool=Pool(slots, kv_heads, dim, case.dtype, buffers),
    )
    layers = [RadixAttention(q_heads, dim, dim**-0.5, kv_heads, index) for index in range(LAYERS)]
    tokens = case.batch * case.rows
    q = torch.randn(tokens, q_heads * dim).to(case.dtype)
    k, v = (torch.randn(tokens, kv_heads, dim).to(case.dtype) for _ in range(2))
    ours, stock = forward_batches(case, req_to_token)

    def forward(backend, batch) -> torch.Tensor:
        """The last layer's output."""
        backend.init_forward_metadata(batch)
        step = backend.forward_decode if batch.forward_mode.is_decode() else backend.forward_extend
        for layer in layers:
            out = step(q, k, v, layer, batch)
        return out

    def by_request() -> torch.Tensor:
        pool, last = runner.token_to_kv_pool, layers[-1].layer_id
        pool.set_kv_buffer(layers[-1], SimpleNamespace(loc=ours.out_cache_loc), k, v)
        out = []
        for request, prefix in enumerate(ours.extend_prefix_lens.tolist()):
            seen = req_to_token[request + 1, : prefix + case.rows].long()
            keys, values = (side(last)[seen].float().repeat_interleave(q_heads // kv_heads, 1) for side in (pool.get_key_buffer, pool.get_value_buffer))
            rows = q.view(case.batch, case.rows, q_heads, dim)[request].float()
            scores = torch.einsum("rhd,chd->hrc", rows, keys) * dim**-0.5
            hidden = torch.arange(prefix + case.rows) > prefix + torch.arange(case.rows)[:, None]
            out.append(torch.einsum("hrc,chd->rhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values))
        return torch.cat(out).view(tokens, -1)

    def check(got: torch.Tensor, want: torch.Tensor) -> None:
        tolerance = 1e-4 if case.dtype == torch.float32 else 5e-2
        torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=tolerance)

    absent = ""
    if case.mode == "verify" and case.batch * case.context > STOCK_VERIFY_COLUMNS:
        absent = f"above {STOCK_VERIFY_COLUMNS} columns it recomputes the prefixes for seconds"
    ours_backend, stock_backend = TiledAttnBackend(runner), TorchNativeAttnBackend(runner)
    return [
        Arm("ours", OURS, lambda: forward(ours_backend, ours), check),
        Arm("by request", REFERENCE, by_request, timed=False),
        Arm("SGLang torch_native", LIBRARY, lambda: forward(stock_backend, stock), check, absent=absent),
    ]


def scores(case: Case) -> int:
    """Of one layer."""
    return case.batch * case.rows * (case.context + case.rows) * SHAPES[case.shape][0]


def measured(case: Case) -> Measured:
    return Measured(case.mode, case.dims, partial(arms_of, case))


def cases(options: Options) -> Iterator[Measured]:
    if options.device == "cpu":
        yield from (measured(case) for case in grid(options) if case.mode != "verify" or scores(case) <= LARGEST_VERIFY)


def grid(options: Options) -> Iterator[Case]:
    batches, contexts, widths = ((1, 8), (64,), (7,)) if options.quick else (BATCHES, CONTEXTS, WIDTHS)
    extends = ((1, 0, 64),) if options.quick else ((1, 0, 64), (1, 0, 1024), (1, 1024, 128), (16, 0, 64), (8, 256, 32))
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for batch in batches:
                for context in contexts:
                    for mode, rows in (("decode", 1), *(("verify", width) for width in widths)):
                        yield Case(mode, shape, dtype, batch, context, False, rows)
                for mode, rows in (("decode", 1), ("verify", 7)):
                    if batch > 1 and not options.quick:
                        yield Case(mode, shape, dtype, batch, contexts[-1], True, rows)
            for batch, prefix, rows in extends:
                yield Case("extend", shape, dtype, batch, prefix, False, rows)
