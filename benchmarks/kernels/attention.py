"""Attention of the CPU platform beside SGLang's stock `torch_native` backend: same pool, same rows, one process.

    python -m benchmarks.cpu_attention                 # the table, and benchmarks/results/cpu_attention.csv
    python -m benchmarks.cpu_attention --quick         # fewer shapes, no CSV
    python -m benchmarks.cpu_attention --threads 2     # wall time on several threads, no CSV

One sample is the attention of one forward: metadata once, then every layer (KV write, gather, softmax). The two
arms alternate inside the same loop and the fastest sample of each counts. On one thread the clock is that thread's
CPU time, so a busy neighbour does not count; on several it is the wall clock, and the machine should be idle.
`ratio` is stock / ours (above 1: ours is faster). The verify rows at width W run the stock arm as an extend of W
rows, which recomputes the prefix: it is left out above STOCK_VERIFY_COLUMNS. `vs_decode` is our verify over our decode at the same batch and lengths. A context `64..2048` means lengths
drawn uniformly from that range.

The CSV, one core of an AMD EPYC (Zen 5, AVX-512), torch 2.14.1: AR decode is faster than stock in all 76 rows (fp32
1.11 to 4.0 times, bf16 1.5 to 12.1), prefill 0.86 to 7.7 times as fast (slowest: 16 prompts of 64 tokens at 8B heads).
Verify rows cost 1.9 (W = 7) and 3.4 (W = 15) times the decode row's attention in the median: 7 and 15 times the
arithmetic over the same gathered KV.
"""

import argparse
import csv
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the platform sets it for a server

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from idlm_sglang.platform.attention import TiledAttnBackend

RESULTS = Path(__file__).parent / "results" / "cpu_attention.csv"
# (query heads, KV heads, head dim, layers, layers with their own KV): the embedded model, and Qwen3-8B's heads.
SHAPES = {"demo": (4, 2, 64, 4, 4), "8b": (32, 8, 128, 4, 1)}
DECODE_BATCHES, CONTEXTS, WIDTHS = (1, 8, 32, 64), (64, 256, 512, 2048), (7, 15)
SECONDS_PER_ARM = 0.3
STOCK_VERIFY_COLUMNS = 4096


class Pool:
    """The part of SGLang's KV pool that attention uses; `layers` beyond the number of buffers share them."""

    start_layer = 0

    def __init__(self, slots: int, heads: int, dim: int, dtype: torch.dtype, buffers: int) -> None:
        self.keys = [torch.randn(slots, heads, dim).to(dtype) for _ in range(buffers)]
        self.values = [torch.randn(slots, heads, dim).to(dtype) for _ in range(buffers)]

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.keys[layer_id % len(self.keys)]

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.values[layer_id % len(self.values)]

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


def forward_batches(case: Case, req_to_token: torch.Tensor) -> tuple[SimpleNamespace, SimpleNamespace]:
    """The same rows as (ours, stock) see them."""
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


def measure(case: Case, clock: Callable[[], float]) -> dict[str, float]:
    """Fastest microseconds per layer of each arm."""
    q_heads, kv_heads, dim, layer_count, buffers = SHAPES[case.shape]
    columns = case.context + case.rows
    slots = case.batch * columns + 1
    torch.manual_seed(0)
    req_to_token = torch.zeros(case.batch + 1, columns, dtype=torch.int32)
    req_to_token[1:] = (torch.randperm(slots - 1) + 1).view(case.batch, columns).int()
    runner = SimpleNamespace(
        device="cpu",
        req_to_token_pool=SimpleNamespace(req_to_token=req_to_token),
        token_to_kv_pool=Pool(slots, kv_heads, dim, case.dtype, buffers),
    )
    layers = [RadixAttention(q_heads, dim, dim**-0.5, kv_heads, index) for index in range(layer_count)]
    tokens = case.batch * case.rows
    q = torch.randn(tokens, q_heads * dim).to(case.dtype)
    k, v = (torch.randn(tokens, kv_heads, dim).to(case.dtype) for _ in range(2))
    arms = dict(zip(("ours", "stock"), forward_batches(case, req_to_token)))
    backends = {"ours": TiledAttnBackend(runner), "stock": TorchNativeAttnBackend(runner)}

    def forward(arm: str) -> torch.Tensor:
        backend, batch = backends[arm], arms[arm]
        backend.init_forward_metadata(batch)
        step = backend.forward_decode if batch.forward_mode.is_decode() else backend.forward_extend
        for layer in layers:
            out = step(q, k, v, layer, batch)
        return out

    if case.mode == "verify" and case.batch * case.context > STOCK_VERIFY_COLUMNS:
        del arms["stock"]
    else:
        _check_equal(case, forward("ours"), forward("stock"))
    best = dict.fromkeys(arms, float("inf"))
    deadline = time.perf_counter() + SECONDS_PER_ARM * len(arms)
    rounds = 0
    while rounds < 3 or time.perf_counter() < deadline:
        rounds += 1
        for arm in arms:
            began = clock()
            forward(arm)
            best[arm] = min(best[arm], clock() - began)
    return {arm: seconds * 1e6 / layer_count for arm, seconds in best.items()}


def _check_equal(case: Case, ours: torch.Tensor, stock: torch.Tensor) -> None:
    tolerance = 1e-4 if case.dtype == torch.float32 else 5e-2
    torch.testing.assert_close(ours, stock, atol=tolerance, rtol=tolerance)


def cases(quick: bool) -> list[Case]:
    batches, contexts = ((1, 8), (64, 512)) if quick else (DECODE_BATCHES, CONTEXTS)
    found = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for batch in batches:
                for context in contexts:
                    for mode, rows in (("decode", 1), *(("verify", width) for width in WIDTHS)):
                        found.append(Case(mode, shape, dtype, batch, context, False, rows))
                for mode, rows in (("decode", 1), ("verify", WIDTHS[0])):
                    if batch > 1:
                        found.append(Case(mode, shape, dtype, batch, contexts[-1], True, rows))
            for batch, prefix, rows in ((1, 0, 64), (1, 0, 1024), (1, 1024, 128), (16, 0, 64), (8, 256, 32)):
                found.append(Case("extend", shape, dtype, batch, prefix, False, rows))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes, and leave the CSV alone")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    print(f"torch {torch.__version__}, {options.threads} threads, {clock.__name__}")
    header = ["mode", "shape", "dtype", "batch", "context", "rows", "stock_us", "ours_us", "ratio", "vs_decode"]
    print(("{:>10}" * len(header)).format(*header))
    records, decode_us = [], {}
    for case in cases(options.quick):
        timing = measure(case, clock)
        lengths = (case.shape, case.dtype, case.batch, case.context, case.spread)
        if case.mode == "decode":
            decode_us[lengths] = timing["ours"]
        context = f"64..{case.context}" if case.spread else str(case.context)
        records.append(
            [
                case.mode,
                case.shape,
                "fp32" if case.dtype == torch.float32 else "bf16",
                case.batch,
                context,
                case.rows,
                round(timing["stock"]) if "stock" in timing else "",
                round(timing["ours"]),
                f"{timing['stock'] / timing['ours']:.2f}" if "stock" in timing else "",
                f"{timing['ours'] / decode_us[lengths]:.2f}" if case.mode == "verify" else "",
            ]
        )
        print(("{:>10}" * len(header)).format(*map(str, records[-1])), flush=True)
    if not options.quick and options.threads == 1:
        with RESULTS.open("w", newline="") as file:
            csv.writer(file).writerows([header, *records])


if __name__ == "__main__":
    main()
