"""Decode graphs without a device to capture on: a replay is a call.

Runner, static buffers, padding and attention metadata are those of a GPU. Only what ``torch.cuda.CUDAGraph`` does is replaced: in
place of kernels with their addresses the forward itself is kept, and run again on the same buffers. Nothing is faster by it. It lets
what surrounds a graph be run, and be found wrong, where there is none.
"""

from collections.abc import Callable
from contextlib import contextmanager

from sglang.srt.model_executor.runner_backend.base_cuda_graph_backend import BaseCudaGraphBackend


class RecordedCalls(BaseCudaGraphBackend):
    """SGLang's interface of a captured graph, over callables.

    A graph holds the addresses of the metadata that its attention was captured with; a call finds it by the attention backend's
    attribute, which is put back for it.
    """

    def __init__(self, runner, *, enable_memory_saver: bool = False):
        self._attention = runner.attn_backend
        self._calls: dict = {}

    @contextmanager
    def capture_session(self, stream):
        yield

    def capture_one(self, shape_key, forward_fn: Callable, capture_inputs=None, post_warmup_hook: Callable[[], None] | None = None) -> None:
        forward_fn()
        self._calls[shape_key] = forward_fn, self._attention.forward_metadata

    def can_run(self, forward_batch, shape_key) -> bool:
        return shape_key in self._calls

    @contextmanager
    def replay_session(self):
        yield

    def replay(self, shape_key, static_forward_batch, **kwargs):
        call, self._attention.forward_metadata = self._calls[shape_key]
        return call()

    def cleanup(self) -> None:
        self._calls.clear()


def on_host(runner_class: type) -> type:
    """A decode graph runner class without what it asks of a device's streams and events."""

    class OnHost(runner_class):
        def _capture(self) -> None:
            self.warmup()
            self.buffers.seq_lens.fill_(self.seq_len_fill_value)
            self.buffers.seq_lens_cpu.fill_(self.seq_len_fill_value)
            self.buffers.reset_index_buffers()
            with self.backend.capture_session(None):
                self._capture_one_stream()

        def _record_in_graph_metadata_prep_done(self) -> None:
            pass

    return OnHost
