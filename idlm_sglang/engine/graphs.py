"""CUDA graphs of decode forwards: SGLang's own runner, once for every stride.

SGLang captures one runner, of one width. Here each stride has its own: stride 1 the ordinary DECODE forward, stride N a
TARGET_VERIFY of 2N - 1 rows per request, at every batch size of a list. A forward is replayed by the runner of its own mode and
width, so that nothing has to be switched when the stride changes; what no runner takes runs eagerly.

The rows of padding requests are SGLang's: request slot 0, KV slot 0, position 0, length 1, none of which belongs to a request. Their
logits are cut off behind the replay; ISD's state, kept by request slot, never sees them. A gated adapter is told of them
(:meth:`StrideGraphs.load_batch`): its rows are read from a buffer, what an earlier step left there would name rows of requests.
What they read as their mask, where branch rounds have one (``engine.masks``), lies behind the requests' own and means nothing.
"""

import functools
import logging
import time
from contextlib import contextmanager

import torch
from sglang.srt.layers.attention.verify_mask import TreeMaskMode, VerifyMask
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
from sglang.srt.model_executor.runner import DecodeCudaGraphRunner
from sglang.srt.runtime_context import get_exec, get_parallel

from idlm_sglang.config import ON, Settings, SettingError, handed_down
from idlm_sglang.engine.controller import agreed
from idlm_sglang.engine.graph_sizes import MOST_ROWS, captured_strides, mask_bytes, rows_of_logits, sizes_of
from idlm_sglang.engine.lora import Gate
from idlm_sglang.engine.masks import BranchMask
from idlm_sglang.engine.spec_io import IsdVerifyInput

logger = logging.getLogger(__name__)

# No further stride is begun beyond these, for all strides together.
_SECONDS = 120.0
_BYTES = 4 << 30


class StrideGraphs(DecodeCudaGraphRunner):
    """Decode forwards of one stride, captured at each of some batch sizes.

    Args:
        model_runner: SGLang's; its ``idlm_gate`` is the adapter's gate.
        stride: N; the forwards have 2N - 1 rows per request.
        sizes: batch sizes, ascending.
        attention: an attention backend of its own: its buffers are part of the graphs.
    """

    def __init__(self, model_runner, stride: int, sizes: list[int], attention):
        self.stride, self._drafts = stride, stride - 1
        self._gate: Gate = getattr(model_runner, "idlm_gate", None) or Gate()
        self._padding = self._gate.padding(max(sizes), self._drafts, model_runner.device)
        self._masks: BranchMask | None = getattr(model_runner, "idlm_masks", None)
        with _asking_for(sizes):
            super().__init__(model_runner, attn_backend=attention, speculative_num_steps=self._drafts, speculative_num_draft_tokens=2 * stride - 1)

    def capture(self) -> None:
        if self.stride == 1:
            # The base class takes every forward of a speculative algorithm for a verify forward.
            self.capture_forward_mode = ForwardMode.DECODE
        super().capture()

    def get_spec_info(self, num_tokens: int) -> IsdVerifyInput | None:
        if self.stride == 1:
            return None
        return IsdVerifyInput(draft_token=None, positions=None, draft_token_num=self.captured_req_width, custom_mask=self._in_place())

    def capture_one_shape(self, size: int, forward, *args, **kwargs) -> None:
        rows = size * self._drafts

        @functools.wraps(forward)
        def gated(*fargs, **fkwargs):
            with self._gate.on_reserved(rows):
                return forward(*fargs, **fkwargs)

        self._gate.put(self._padding[:rows], 0)
        super().capture_one_shape(size, gated, *args, **kwargs)

    def can_run_graph(self, forward_batch) -> bool:
        spec_info = forward_batch.spec_info
        if forward_batch.forward_mode != self.capture_forward_mode or forward_batch.input_embeds is not None:
            return False
        if forward_batch.capture_hidden_mode > self.capture_hidden_mode:
            return False
        if self.stride > 1 and (spec_info.num_tokens_per_req != self.captured_req_width or not self._masks_as_captured(spec_info)):
            return False
        return super().can_run_graph(forward_batch)

    def _masks_as_captured(self, spec_info: IsdVerifyInput) -> bool:
        if self._masks is None:
            return spec_info.new_visible is None
        return self._masks.is_captured(spec_info.custom_mask)

    def _in_place(self) -> torch.Tensor | None:
        """For SGLang, which copies a forward's mask into the graph's buffer: nothing, since it was written there."""
        return None if self._masks is None else self._masks.captured[:0]

    def load_batch(self, forward_batch, pp_proxy_tensors=None) -> None:
        """Copy a batch into the static buffers, padded; the adapter's rows behind the batch's own are those of the padding requests."""
        if self.stride > 1:
            forward_batch.spec_info.custom_mask = self._in_place()
        super().load_batch(forward_batch, pp_proxy_tensors)
        own = self.raw_bs * self._drafts
        self._gate.put(self._padding[own : self.bs * self._drafts], own)


class DecodeGraphs:
    """In place of SGLang's one decode graph runner: a runner per stride, chosen by the forward itself.

    Attributes:
        runners: by width 2N - 1.
        bs: padded batch size of the last replay, or None.
    """

    decode_graph_gather_requirements = DecodeCudaGraphRunner.decode_graph_gather_requirements

    def __init__(self, model_runner):
        self.runners: dict[int, StrideGraphs] = {}
        self.bs: int | None = None
        start, free, left = time.perf_counter(), _free(model_runner), []
        shared = _SharedState(model_runner)
        for stride in captured_strides(handed_down()):
            over = time.perf_counter() - start > _SECONDS or free - _free(model_runner) > _BYTES
            # The first rank's clock and memory decide for all: a rank without a runner would leave the others waiting in a collective.
            if agreed(get_parallel().tp_group, int(over)):
                left.append(stride)
                continue
            self._add(model_runner, stride, shared)
        logger.info("idlm: decode graphs of %d strides: %s", len(self.runners), _spent(model_runner, start, free))
        if left:
            logger.warning("idlm: no decode graphs for the strides %s, which run eagerly: %.0f s or %d MB are used", left, _SECONDS, _BYTES >> 20)

    def _add(self, model_runner, stride: int, shared: "_SharedState") -> None:
        sizes = sizes_of(model_runner, stride)
        if not sizes:
            logger.warning("idlm: no decode graphs for stride %d: no batch size fits into %d rows", stride, MOST_ROWS)
            return
        start, free = time.perf_counter(), _free(model_runner)
        runner = _runner_class(model_runner.device)(model_runner, stride, sizes, shared.attention())
        self.runners[2 * stride - 1] = runner
        shown = ", ".join(map(str, runner.capture_bs))
        logger.info("idlm: decode graphs of stride %d, batch sizes %s: %s", stride, shown, _spent(model_runner, start, free))

    @property
    def capture_bs(self) -> list[int]:
        return sorted({size for runner in self.runners.values() for size in runner.capture_bs})

    def _of(self, forward_batch) -> StrideGraphs | None:
        mode = forward_batch.forward_mode
        if mode.is_decode():
            return self.runners.get(1)
        return self.runners.get(forward_batch.spec_info.num_tokens_per_req) if mode.is_target_verify() else None

    def can_run_graph(self, forward_batch) -> bool:
        runner = self._of(forward_batch)
        return runner is not None and runner.can_run_graph(forward_batch)

    def load_batch(self, forward_batch, pp_proxy_tensors=None) -> None:
        self._of(forward_batch).load_batch(forward_batch, pp_proxy_tensors)

    def execute(self, forward_batch, pp_proxy_tensors=None):
        runner = self._of(forward_batch)
        output = runner.execute(forward_batch, pp_proxy_tensors)
        self.bs = runner.bs
        return output


class _SharedState:
    """What the runners have in common: the logits' buffer, and one list of KV slots, which every replay writes before it reads."""

    def __init__(self, model_runner):
        self._model_runner = model_runner
        rows = rows_of_logits(model_runner)
        if model_runner.graph_shared_output is None:
            model_runner.graph_shared_output = GraphSharedOutput(device=model_runner.device, max_rows=rows)
        self._indices: torch.Tensor | None = None
        self._masks: BranchMask | None = getattr(model_runner, "idlm_masks", None)
        if self._masks is not None:
            self._masks.reserve(*mask_bytes(model_runner))
            logger.info("idlm: masks of captured branch rounds: %.1f MB", len(self._masks.captured) / 2**20)

    def attention(self):
        """A new attention backend of the model runner's kind."""
        backend = self._model_runner._get_attention_backend()
        if self._model_runner.decode_attention_backend_str == "triton":
            self._bound(backend)
        return backend

    def _bound(self, backend) -> None:
        """SGLang's Triton state has a list of ``context`` slots and partial results for every *row*, and a mask over the context: a verify
        forward reads one list per request, no partial results, and no mask or the one of all runners."""
        backend.num_draft_tokens = None  # no mask of its own
        whole = backend.init_cuda_graph_state

        def per_request(max_bs: int, max_num_tokens: int) -> None:
            size = max_bs * backend.max_context_len
            if self._indices is None or len(self._indices) < size:
                self._indices = torch.zeros(size, dtype=torch.int64, device=backend.device)
            whole(max_bs, max_bs, kv_indices_buf=self._indices)
            if self._masks is not None:
                backend._verify_mask = VerifyMask(self._masks.captured, TreeMaskMode.FULL_MASK, max_bs)

        backend.init_cuda_graph_state = per_request


def ready(model_runner, settings: Settings) -> None:
    """Check, when all graphs are captured, that they are ours; on a CPU, where SGLang asks nobody, make them.

    Raises:
        SettingError: SGLang captured its own.
    """
    if settings.decode_graphs == ON and model_runner.device == "cpu":
        model_runner.decode_cuda_graph_runner = DecodeGraphs(model_runner)
    runner = getattr(model_runner, "decode_cuda_graph_runner", None)
    if runner is not None and not isinstance(runner, DecodeGraphs):
        raise SettingError(f"{type(runner).__name__} cannot replay ISD's decode forwards; allowed: --cuda-graph-backend-decode disabled")
    if settings.decode_graphs == ON and runner is None:
        logger.warning("idlm: IDLM_DECODE_GRAPHS=on, but SGLang captured no decode graphs; decode forwards run eagerly")


@contextmanager
def _asking_for(sizes: list[int]):
    """In here SGLang's list of batch sizes is this one."""
    config = get_exec().graph.cuda_graph_config.decode
    before, config.bs = config.bs, sizes
    try:
        yield
    finally:
        config.bs = before


def _runner_class(device: str) -> type[StrideGraphs]:
    if device != "cpu":
        return StrideGraphs
    from idlm_sglang.platform.calls import on_host

    return on_host(StrideGraphs)


def _free(model_runner) -> int:
    """Free bytes of the device; 0 on a CPU, where nothing is captured."""
    return torch.cuda.mem_get_info(model_runner.gpu_id)[0] if model_runner.device == "cuda" else 0


def _spent(model_runner, start: float, free: int) -> str:
    """Time and device memory since then, as the log shows them."""
    took = f"{time.perf_counter() - start:.1f} s"
    return f"{took}, {(free - _free(model_runner)) / 2**20:.1f} MB" if free else took
