"""Step times at start-up: the worker's own decode steps, on requests that do not exist, before the first one that does."""

import logging
import time
from array import array

import torch
from sglang.srt.managers.schedule_batch import Req, ReqKvInfo, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams

from idlm_sglang.engine.masks import note_columns
from idlm_sglang.engine.requests import STRIDED, RequestPlan
from idlm_sglang.engine.spec_io import IsdDraftInput

logger = logging.getLogger(__name__)

# Committed tokens of a measured request; a step with long contexts is timed in service.
_LENGTH = 256
_RUNS = 4


def batch_sizes(largest: int) -> list[int]:
    """1, 4, 16, .. and ``largest``: what lies between is interpolated."""
    sizes = {largest}
    size = 1
    while size < largest:
        sizes.add(size)
        size *= 4
    return sorted(sizes)


def more_runs(left: float, step: float, strides: int) -> int:
    """Further runs of a step that took ``step`` seconds, where ``strides`` have to share the ``left`` ones: steps that are slow waver less."""
    return max(0, min(_RUNS - 1, int(left / (strides * step))))


def measure(worker, strides: tuple[int, ...], largest: int, seconds: float) -> dict[tuple[int, int], float]:
    """Seconds of one decode step by (batch size, stride): the shortest of some runs, forward and drafts included.

    The requests' KV lies in slots that nobody owns yet, and their rows of the request table are cleared behind them. All
    tensor-parallel ranks take part; the first rank's clock ends it behind about ``seconds``, with a batch size complete: two steps of
    each stride, however slow they are.

    Args:
        worker: the ISD worker, its pools allocated.
        largest: requests that run at a time at most.
    """
    start, table = time.perf_counter(), {}
    # All rows of a stride: which ones a request leaves out is up to its drafts, and what that saves is learned in service.
    before, trims, worker.trims = worker.stride, worker.trims, False
    for size in batch_sizes(largest):
        batch = _Batch(worker, size, max(strides))
        for place, stride in enumerate(strides):
            worker.set_stride(stride)
            # The first may compile or allocate.
            batch.step()
            table[size, stride] = shortest = batch.step()
            left = seconds - (time.perf_counter() - start)
            for _ in range(worker.agreed(more_runs(left, shortest, len(strides) - place))):
                table[size, stride] = min(table[size, stride], batch.step())
        batch.clear()
        if worker.agreed(int(time.perf_counter() - start > seconds)):
            break
    worker.trims = trims
    worker.set_stride(before)
    took = time.perf_counter() - start
    shown = ", ".join(f"{n}: " + "/".join(f"{1e3 * table[b, n]:.1f}" for b in sorted({b for b, _ in table})) for n in strides)
    sizes = "/".join(str(b) for b in sorted({b for b, _ in table}))
    logger.info("idlm: step times in ms at %s requests by stride, measured in %.1f s: %s", sizes, took, shown)
    return table


class _Batch:
    """A decode batch of greedy requests that exist in no queue."""

    def __init__(self, worker, size: int, widest: int):
        runner = worker.model_runner
        self._worker, self._size = worker, size
        pool = runner.req_to_token_pool
        columns = min(_LENGTH + 2 * widest, pool.req_to_token.shape[1], runner.max_total_num_tokens)
        self._length = max(columns - 2 * widest, 1)
        self._slots = torch.arange(1, size + 1, dtype=torch.int64, device=worker.device)
        every = torch.arange(size * columns, device=worker.device) % runner.max_total_num_tokens
        pool.req_to_token[self._slots, :columns] = every.view(size, columns).to(pool.req_to_token.dtype)
        params = SamplingParams(temperature=0, max_new_tokens=columns)
        params.normalize(None)
        reqs = []
        for i in range(size):
            req = Req(f"idlm-{i}", "", array("q", [0]), params, vocab_size=worker.vocab)
            req.kv = ReqKvInfo(kv_allocated_len=self._length + 2 * widest)
            req.idlm_plan = RequestPlan(-1 - i, STRIDED, "default", None, 0, True)
            reqs.append(req)
        allocator = runner.token_to_kv_pool_allocator
        self._batch = ScheduleBatch.init_new(reqs, pool, allocator, None, runner.model_config, False, runner.spec_algorithm)
        note_columns(self._batch)

    def step(self) -> float:
        """One decode step; its seconds, until the device is done."""
        worker, batch, size = self._worker, self._batch, self._size
        lengths = torch.full((size,), self._length, dtype=torch.int64)
        batch.forward_mode = ForwardMode.DECODE
        batch.req_pool_indices, batch.req_pool_indices_cpu = self._slots, self._slots.cpu()
        batch.seq_lens, batch.seq_lens_cpu = lengths.to(worker.device), lengths
        batch.orig_seq_lens, batch.seq_lens_sum = batch.seq_lens.to(torch.int32), size * self._length
        batch.sampling_info = SamplingBatchInfo.from_schedule_batch(batch, worker.vocab)
        batch.spec_info = IsdDraftInput(torch.zeros_like(batch.seq_lens), batch.seq_lens)
        self._wait()
        start = time.perf_counter()
        worker.decode(batch)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._worker.device != "cpu":
            torch.get_device_module(self._worker.device).synchronize()

    def clear(self) -> None:
        self._batch.req_to_token_pool.req_to_token[self._slots] = 0
        self._worker.state.clear(self._slots)
