"""A worker of ISD in this process, and decode steps of it on random KV: eager, and through captured forwards.

With Triton attention rejections leave branch rounds; each attention of the eager steps is held against its definition.

    python -m tests.engine.captured triton                           on a GPU: real graphs
    TRITON_INTERPRET=1 python -m tests.engine.captured triton        on a CPU (torch_native: without TRITON_INTERPRET)
    ... python -m tests.engine.captured triton risd                  the embedded base model with its gated adapter

Scheduler, model runner, worker, attention backend, graph runners and their buffers are the real ones. Without a GPU one thing is
not: in place of a ``torch.cuda.CUDAGraph`` the captured callable is kept and called again (``platform.calls``). Prints one JSON object.
"""

import json
import os
import sys
from array import array
from contextlib import contextmanager

import torch

from idlm_sglang.demo import CHECKPOINT_DIR, RISD_ADAPTER_DIR, RISD_BASE_DIR
from idlm_sglang.isd import visible_rows

STRIDES, SIZES = (4, 1, 2), (1, 2, 4)
# Requests and stride of each step: padded and unpadded batches, a wider one before a narrower one so that its rows stay behind in
# the buffers, a batch above the largest size, a stride without graphs.
STEPS = [(4, 4), (3, 4), (3, 4), (1, 4), (3, 2), (3, 1), (3, 4), (5, 4), (3, 3), (3, 4), (2, 2), (3, 4)]
COLUMNS = 96


def worker(backend: str, risd: bool):
    """The worker of a scheduler that runs no loop."""
    os.environ.update({"IDLM_DECODE_GRAPHS": "on", "IDLM_STRIDE": "4", "IDLM_SELFCHECK": "0"})
    os.environ["IDLM_SALVAGE"] = "branch" if backend == "triton" else "chain"
    if risd:
        os.environ["IDLM_LORA"] = str(RISD_ADAPTER_DIR)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, prepare_server_args

    from idlm_sglang.engine import graphs

    graphs.captured_strides = lambda settings: STRIDES
    flags = ["--model-path", str(RISD_BASE_DIR if risd else CHECKPOINT_DIR), "--dtype", "float32", "--speculative-algorithm", "ISD"]
    flags += ["--attention-backend", backend, "--max-running-requests", "8", "--max-total-tokens", "2048", "--log-level", "error"]
    flags += ["--context-length", "256", "--cuda-graph-backend-prefill", "disabled", "--cuda-graph-bs-decode", *map(str, SIZES)]
    args = prepare_server_args(flags)
    ports = PortArgs.init_new(args)
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    return Scheduler(args, ports).draft_worker


class Run:
    """The steps, from the same KV, tokens and lengths each time.

    Attributes:
        answers: by step, the tokens committed by each request.
        captured: by step, whether SGLang says that a graph was replayed.
        touched: KV slots that changed without being any request's, slot 0 left out.
        hidden: pairs of a row and a column that the rounds hid from each other, by layer and round.
        attention_apart: the largest difference of an eager verify attention from its definition.
    """

    def __init__(self, worker, runner):
        self._worker = worker
        worker.model_runner.decode_cuda_graph_runner = runner
        generator = torch.Generator().manual_seed(0)
        pool = worker.model_runner.token_to_kv_pool
        device = worker.device
        self._caches = [*pool.k_buffer, *pool.v_buffer]
        for cache in self._caches:
            cache.copy_(torch.randn(cache.shape, generator=generator))
        before = [cache.clone() for cache in self._caches]
        most = max(size for size, _ in STEPS)
        own = (torch.randperm(2000, generator=generator)[: most * COLUMNS] + 1).to(device)
        self._own = own
        worker.req_to_token.zero_()
        worker.req_to_token[1 : most + 1, :COLUMNS] = own.view(most, COLUMNS).int()
        worker.state.clear(torch.arange(len(worker.state.counts), device=device))
        self._lengths = torch.randint(20, 40, (most,), generator=generator).to(device)
        self._pending = torch.randint(4, 400, (most,), generator=generator).to(device)
        self._reqs = _requests(worker, most)
        self.answers, self.captured = [], []
        self.hidden, self.attention_apart = 0, 0.0
        with self._attention_compared():
            for size, stride in STEPS:
                self._step(size, stride)
        foreign = torch.ones(len(before[0]), dtype=torch.bool, device=device)
        foreign[own], foreign[0] = False, False
        self.touched = sum(int((cache != old).flatten(1).any(1)[foreign].sum()) for cache, old in zip(self._caches, before))
        self.kv = torch.stack([cache[own] for cache in self._caches])
        self.state = worker.state._table.clone()

    @contextmanager
    def _attention_compared(self):
        """In here every eager TARGET_VERIFY attention is computed a second time."""
        backend, masks, marked = self._worker.model_runner.attn_backend, self._worker.masks, []
        forward = backend.forward_extend

        def compared(q, k, v, layer, forward_batch, *args, **kwargs):
            out = forward(q, k, v, layer, forward_batch, *args, **kwargs)
            verifies = forward_batch.forward_mode.is_target_verify()
            visible = None if not verifies else marked[-1] if marked else forward_batch.spec_info.new_visible
            if visible is not None:
                self.hidden += int((~visible).sum())
                expected = _naive(q, layer, forward_batch, backend, visible)
                self.attention_apart = max(self.attention_apart, float((out.view(expected.shape) - expected).abs().max()))
            return out

        def write(counts, forks, lengths, width, columns):
            # By its definition, not as it lies in the buffer.
            marked.append(visible_rows(counts, forks, width))
            return type(masks).write(masks, counts, forks, lengths, width, columns)

        backend.forward_extend = compared
        if masks is not None:
            masks.write = write
        try:
            yield
        finally:
            del backend.forward_extend
            if masks is not None:
                del masks.write

    def _step(self, size: int, stride: int) -> None:
        from sglang.srt.managers.schedule_batch import ScheduleBatch
        from sglang.srt.model_executor.forward_batch_info import ForwardMode
        from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

        from idlm_sglang.engine.masks import note_columns
        from idlm_sglang.engine.spec_io import IsdDraftInput

        worker, runner = self._worker, self._worker.model_runner
        worker.set_stride(stride)
        batch = ScheduleBatch.init_new(
            self._reqs[:size], runner.req_to_token_pool, runner.token_to_kv_pool_allocator, None, runner.model_config, False, runner.spec_algorithm
        )
        note_columns(batch)
        batch.forward_mode = ForwardMode.DECODE
        batch.req_pool_indices_cpu = torch.arange(1, size + 1)
        batch.req_pool_indices = batch.req_pool_indices_cpu.to(worker.device)
        batch.seq_lens = self._lengths[:size].clone()
        batch.seq_lens_cpu, batch.orig_seq_lens = batch.seq_lens.cpu(), batch.seq_lens.int()
        batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
        batch.sampling_info = SamplingBatchInfo.from_schedule_batch(batch, worker.vocab)
        batch.spec_info = IsdDraftInput(self._pending[:size].clone(), batch.seq_lens)
        self._spoil()
        result = worker.decode(batch)
        tokens = result.next_token_ids.view(size, -1)
        self.answers.append([row[:n].tolist() for row, n in zip(tokens, result.accept_lens)])
        self.captured.append(bool(result.can_run_cuda_graph))
        self._lengths[:size] = result.new_seq_lens
        self._pending[:size] = result.next_draft_input.bonus_tokens

    def _spoil(self) -> None:
        """Leave in every buffer of the graphs what would do harm if a padding row kept it: slots, KV slots and rows of requests."""
        if self._worker.gate.adapted:
            self._worker.gate._buffer.zero_()
        for runner in getattr(self._worker.model_runner.decode_cuda_graph_runner, "runners", {}).values():
            buffers = runner.buffers
            buffers.req_pool_indices.fill_(1)
            buffers.seq_lens.fill_(30)
            buffers.seq_lens_cpu.fill_(30)
            buffers.out_cache_loc.fill_(int(self._own[0]))
            buffers.positions.fill_(7)
            buffers.input_ids.fill_(5)


def _naive(q, layer, forward_batch, backend, visible) -> torch.Tensor:
    """``(B, W, q heads, dim)``: softmax over the committed columns and those of ``visible`` ``(B, W, W)``, one request at a time, in float64."""
    pool, width = backend.token_to_kv_pool, visible.shape[1]
    q = q.view(len(visible), width, layer.tp_q_head_num, layer.qk_head_dim).double()
    found = []
    for b, (slot, length) in enumerate(zip(forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist())):
        own = backend.req_to_token[slot, : length + width].long()
        keys, values = (
            buffer[own].double().repeat_interleave(layer.tp_q_head_num // layer.tp_k_head_num, 1)
            for buffer in (pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id))
        )
        sees = torch.ones(width, length + width, dtype=torch.bool, device=q.device).tril(length)
        sees[:, length:] &= visible[b]
        scores = torch.einsum("rhd,chd->hrc", q[b], keys) * layer.scaling
        found.append(torch.einsum("hrc,chd->rhd", scores.masked_fill(~sees, float("-inf")).softmax(-1), values))
    return torch.stack(found)


def _requests(worker, count: int) -> list:
    """Greedy ones and sampled ones, by turns."""
    from sglang.srt.managers.schedule_batch import Req, ReqKvInfo
    from sglang.srt.sampling.sampling_params import SamplingParams

    from idlm_sglang.engine.requests import STRIDED, RequestPlan

    found = []
    for i in range(count):
        params = SamplingParams(temperature=0.8 * (i % 2), max_new_tokens=COLUMNS)
        params.normalize(None)
        req = Req(f"r{i}", "", array("q", [0]), params, vocab_size=worker.vocab)
        req.kv = ReqKvInfo(kv_allocated_len=COLUMNS)
        req.idlm_plan = RequestPlan(i + 1, STRIDED, "default", None, 77 + i, True)
        found.append(req)
    return found


def main(backend: str, *rest: str) -> None:
    found = worker(backend, "risd" in rest)
    graphs = found.model_runner.decode_cuda_graph_runner
    with torch.no_grad():
        eager, captured = Run(found, None), Run(found, graphs)
    backends = [found.model_runner.attn_backend, *(one.attn_backend for one in graphs.runners.values())]
    print(
        json.dumps(
            {
                "sizes": {2 * stride - 1: graphs.runners[2 * stride - 1].capture_bs for stride in STRIDES},
                "eager": eager.answers,
                "captured": captured.answers,
                "replayed": captured.captured,
                "eager_replayed": eager.captured,
                "touched": captured.touched,
                "eager_touched": eager.touched,
                "kv_apart": float((eager.kv - captured.kv).abs().max()),
                "state_apart": int((eager.state[1:] != captured.state[1:]).sum()),
                "padding_state": int(captured.state[0].abs().sum() - eager.state[0].abs().sum()),
                "drafts_tried": int(captured.state[:, 0].sum()),
                "hidden": eager.hidden,
                "attention_apart": eager.attention_apart,
                "backend": backend,
                "room": [getattr(one, "max_context_len", None) for one in backends],
                "context": found.model_runner.model_config.context_len,
            }
        )
    )
    sys.stdout.flush()
    os._exit(0)  # the scheduler's threads and sockets have nothing to end


if __name__ == "__main__":
    main(*sys.argv[1:])
