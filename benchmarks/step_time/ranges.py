"""Runs inside the server: charges the scheduler thread's time to the parts of a step, and names them in a profiler's trace.

Loaded through SGLang's own ``--forward-hooks`` option, whose factory it is: SGLang calls :func:`install` in each
scheduler process when the model is ready and its CUDA graphs are captured. Nothing in the product knows of it.

At any time exactly one part is charged, so the parts of a step add up to its wall time by construction. On a CPU, where
ops run in the calling thread, that is the answer; on a GPU it says when steps begin, and the trace says the rest.
"""

import functools
import time
from collections.abc import Callable

import torch

from benchmarks.step_time.parts import ATTENTION, GEMM, HOST, LM_HEAD, MODEL, PARTS, PREFIX, SETUP, STEP, VERIFY

HOOK = "benchmarks.step_time.ranges:install"


class Recorder:
    """One line per scheduler step in ``path``: begin (ns), decode 0/1, requests, rows of the forward, committed columns
    of all requests (-1: not known on the host), and the nanoseconds of each part until the next step begins.

    Attributes:
        rows, columns: of the current step, filled in while it runs.
    """

    def __init__(self, path: str, now: Callable[[], int] = time.perf_counter_ns):
        self._file, self._now = open(path, "a", buffering=1), now
        self._spent = dict.fromkeys(PARTS, 0)
        self._part, self._since = HOST, now()
        self._step: tuple[int, int, int] | None = None
        self.rows, self.columns = 0, -1

    def switch(self, part: str) -> str:
        """Charge ``part`` from now on; the part charged so far."""
        now = self._now()
        self._spent[self._part] += now - self._since
        self._since, before, self._part = now, self._part, part
        return before

    def begin(self, decode: bool, requests: int) -> None:
        """A step begins, and with it the one before ends."""
        self.switch(self._part)
        if self._step is not None:
            self._file.write(",".join(map(str, (*self._step, self.rows, self.columns, *self._spent.values()))) + "\n")
        self._spent = dict.fromkeys(PARTS, 0)
        self._step = (self._since, int(decode), requests)
        self.rows, self.columns = 0, -1

    def see(self, batch) -> None:
        """Note the committed columns of a batch on its way into the worker."""
        lens = getattr(batch, "seq_lens_cpu", None)
        if self.columns < 0 and lens is not None:
            self.columns = int(lens.sum())


class _Span:
    """``part`` while it is open; a range of that name while a profiler runs."""

    def __init__(self, recorder: Recorder, part: str):
        self._recorder, self._part, self._range = recorder, part, None

    def __enter__(self):
        self._before = self._recorder.switch(self._part)
        if torch.autograd._profiler_enabled():
            self._range = torch.profiler.record_function(PREFIX + self._part)
            self._range.__enter__()
        return self

    def __exit__(self, *error):
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._recorder.switch(self._before)


def _wrap(owner, name: str, recorder: Recorder, part: str) -> None:
    """Charge every call of ``owner.name`` to ``part``."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def spanned(*args, **kwargs):
        with _Span(recorder, part):
            return original(*args, **kwargs)

    setattr(owner, name, spanned)


def install(config: dict) -> None:
    """The factory that ``--forward-hooks`` names. Registers no module hook.

    Args:
        config: ``path`` of the records; ``clock``, ``wall`` or ``cpu``: this thread's own processor time.
    """
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().tp_rank != 0:
        return
    recorder = Recorder(config["path"], time.thread_time_ns if config["clock"] == "cpu" else time.perf_counter_ns)
    scheduler, runner, target, isd = engine()
    for owner, name, part in functions():
        _wrap(owner, name, recorder, part)
    _wrap_steps(scheduler, recorder)
    _wrap_workers(target, isd, recorder)
    _wrap_forward(runner, recorder)


def functions() -> tuple[tuple[type, str, str], ...]:
    """(class, method, part): what is one part from call to return, but for what it calls of the others."""
    from sglang.srt.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.model_runner import ModelRunner

    from idlm_sglang.model import IDLMForCausalLM, MaskFreeLogitsProcessor

    return (
        (RadixAttention, "forward", ATTENTION),
        (ColumnParallelLinear, "forward", GEMM),
        (RowParallelLinear, "forward", GEMM),
        (ReplicatedLinear, "forward", GEMM),
        (MaskFreeLogitsProcessor, "_get_logits", LM_HEAD),
        (IDLMForCausalLM, "forward", MODEL),
        (ModelRunner, "sample", VERIFY),
    )


def engine() -> tuple[type, type, type, type]:
    """Scheduler, model runner, target worker and ISD worker."""
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.model_executor.model_runner import ModelRunner

    from idlm_sglang.engine.worker import IsdWorker

    return Scheduler, ModelRunner, TpModelWorker, IsdWorker


def _wrap_steps(scheduler, recorder: Recorder) -> None:
    original = scheduler.run_batch

    @functools.wraps(original)
    def run_batch(self, batch, *args, **kwargs):
        decode, requests = not batch.forward_mode.is_extend(), len(batch.reqs)
        recorder.begin(decode, requests)
        if not torch.autograd._profiler_enabled():
            return original(self, batch, *args, **kwargs)
        with torch.profiler.record_function(f"{PREFIX}{STEP} {'decode' if decode else 'extend'} {requests}"):
            return original(self, batch, *args, **kwargs)

    scheduler.run_batch = run_batch


def _wrap_workers(target, isd, recorder: Recorder) -> None:
    """The worker's time is set-up until its target forward has returned, and verification from then on."""
    behind: list[_Span] = []
    of_target, of_isd = target.forward_batch_generation, isd.forward_batch_generation

    @functools.wraps(of_target)
    def forward_target(self, batch=None, *args, **kwargs):
        recorder.see(batch)
        with _Span(recorder, SETUP):
            result = of_target(self, batch, *args, **kwargs)
        if kwargs.get("is_verify"):
            behind.append(_Span(recorder, VERIFY).__enter__())
        return result

    @functools.wraps(of_isd)
    def forward_isd(self, batch, *args, **kwargs):
        recorder.see(batch)
        with _Span(recorder, SETUP):
            try:
                return of_isd(self, batch, *args, **kwargs)
            finally:
                while behind:
                    behind.pop().__exit__()

    target.forward_batch_generation, isd.forward_batch_generation = forward_target, forward_isd


def _wrap_forward(runner, recorder: Recorder) -> None:
    """Counts the rows; wraps the attention backend's plan when the first forward shows which backend it is."""
    original, planned = runner.forward, []

    @functools.wraps(original)
    def forward(self, forward_batch, *args, **kwargs):
        if not planned:
            planned.append(True)
            _wrap(type(self.attn_backend), "init_forward_metadata", recorder, ATTENTION)
        recorder.rows = forward_batch.input_ids.shape[0]
        return original(self, forward_batch, *args, **kwargs)

    runner.forward = forward
