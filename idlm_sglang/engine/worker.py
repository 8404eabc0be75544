"""The decoding worker: one target forward per decode step, inside SGLang's scheduler."""

import logging
from dataclasses import replace

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.runtime_context import get_exec, get_observability, get_parallel, get_schedule, get_serving
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from sglang.srt.speculative.spec_utils import record_stream_for_v2_verify

from idlm_sglang.checkpoint import ARCHITECTURE
from idlm_sglang.config import ALGORITHM, AUTO, MAX_STRIDE, ON, REJECTION, SettingError, handed_down
from idlm_sglang.engine import graphs, lora, masks, reserve
from idlm_sglang.engine.admission import plan_of
from idlm_sglang.engine.beside import can_join, prefill
from idlm_sglang.engine.calibrate import measure
from idlm_sglang.engine.controller import StrideControl, agreed
from idlm_sglang.engine.grammar import STRIDED_BACKENDS
from idlm_sglang.engine.metrics import IsdMetrics
from idlm_sglang.engine.penalties import TokenCounts, penalised_rows, sampler_terms
from idlm_sglang.engine.phases import PREFILL, StepPhases
from idlm_sglang.engine.ranks import Ranks
from idlm_sglang.engine.requests import BatchRows, server_seed, stride_limit
from idlm_sglang.engine.single import SingleStep
from idlm_sglang.engine.spec_io import IsdDraftInput, IsdResult
from idlm_sglang.engine.state import SlotState
from idlm_sglang.engine.step_ops import step_ops
from idlm_sglang.engine.stride_series import StrideSeries
from idlm_sglang.engine.strided import StridedStep
from idlm_sglang.engine.transfer import on_device
from idlm_sglang.engine.warm import rows_of as masked_rows
from idlm_sglang.isd import BRANCH, OFF
from idlm_sglang.isd.stride import StepTimes, ladder
from idlm_sglang.model import MaskFreeLogitsProcessor

logger = logging.getLogger(__name__)

# Seconds that measuring step times may take at start-up, or little more.
_MEASURING = 5.0
# Bytes that the float32 logits of a step may take at a stride that the controller chose; fixed ones are the operator's choice.
_LOGITS = 2 << 30
# Batches whose rows are kept: a prefill's and that of the decode step beside it.
_KEPT_ROWS = 2


def _follows_server(req) -> bool:
    """Whether an admitted request has no stride of its own."""
    plan = getattr(req, "idlm_plan", None)
    return plan is not None and plan.stride is None


class IsdWorker(BaseSpecWorker):
    """Drafts and verifies with the target model itself.

    A decode step of stride N runs ``2N - 1`` rows per request in one TARGET_VERIFY forward (``isd.layout``); stride 1
    is SGLang's ordinary DECODE forward with its own sampler. Extends leave their slots without drafts, but for
    those that end a prompt (``engine.warm``). Nothing in a step waits for the device, except where a request's grammar lives on the host.
    """

    def __init__(self, server_args, gpu_id: int, nccl_port: int, target_worker: TpModelWorker):
        super().__init__()
        from idlm_sglang import compat

        compat.assert_applied()
        self._target_worker = target_worker
        self.model_runner = target_worker.model_runner
        if self.model_runner.kv_cache_dtype != self.model_runner.dtype:
            # As for --kv-cache-dtype in engine.algorithm; a checkpoint may ask for it, too.
            kinds = [str(kind).removeprefix("torch.") for kind in (self.model_runner.kv_cache_dtype, self.model_runner.dtype)]
            raise SettingError(f"a KV cache in {kinds[0]} cannot be served with --speculative-algorithm {ALGORITHM}; allowed: one in {kinds[1]}, the model's own (--kv-cache-dtype auto)")
        self.device = target_worker.device
        self.settings = replace(handed_down(), strided_grammars=get_exec().kernel.grammar_backend in STRIDED_BACKENDS)
        self.ops = step_ops(self.settings.step_ops)
        self.ranks = Ranks(get_parallel().tp_group)
        self.trims = self.settings.ragged_verify == ON
        self.stride = self.settings.stride
        self.auto = self.settings.auto
        self.control: StrideControl | None = None
        self._in_flight = 1
        self._partner: ScheduleBatch | None = None
        self._done: IsdResult | None = None
        reserve.serve(self)
        self.server_seed = server_seed()
        self.mask_id = int(self.model_runner.model_config.hf_config.mask_token_id)
        if not isinstance(self.model_runner.model.logits_processor, MaskFreeLogitsProcessor):
            raise SettingError(f"the model was loaded as {type(self.model_runner.model).__name__}; allowed: {ARCHITECTURE}")
        self.gate = lora.attach(self.model_runner.model, self.settings.lora, self.model_runner.model_config.hf_config, self.model_runner.dtype, self.device)
        self.model_runner.idlm_gate = self.gate
        self.masks = self.model_runner.idlm_masks = masks.BranchMask(self.device, self.ops.hide) if self.settings.salvage == BRANCH else None
        self.vocab = self.model_runner.model_config.vocab_size
        self._most_rows = _LOGITS // (4 * self.vocab)
        self.last_position = self.model_runner.model_config.context_len - 1
        self._held = self._hold()
        self.state: SlotState | None = None
        self.counts: TokenCounts | None = None
        self._rows: dict[tuple, BatchRows] = {}
        counts = get_parallel().tp_rank == 0
        labels = None
        if counts and get_observability().enable_metrics:
            labels = {"model_name": get_serving().served_model_name, "dp_rank": str(get_parallel().dp_rank or 0)}
        self.phases = StepPhases()
        self.strides = StrideSeries(labels)
        self.metrics = IsdMetrics(self.settings.max_stride - 1, labels, self.phases.seconds, self.strides) if counts else None

    @property
    def _keeps_q(self) -> bool:
        return self.settings.sampling_rule == REJECTION

    def _hold(self) -> list[torch.Tensor]:
        """Memory of an accelerator for what the slots keep, until they are there: SGLang gives the KV cache what is free, and that comes first."""
        if self.device == "cpu":
            return []
        slots = get_schedule().max_running_requests + 1
        sizes = [slots * self.vocab * 4, SlotState.q_bytes(slots, self.settings.max_stride - 1, self.vocab) * self._keeps_q]
        return [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes if size]

    # What SGLang asks of a speculative worker.

    @property
    def draft_worker(self):
        return None

    def __getattr__(self, name: str):
        if name == "_target_worker":
            raise AttributeError(name)
        return getattr(self._target_worker, name)

    def alloc_memory_pool(self, memory_pool_config=None, req_to_token_pool=None, token_to_kv_pool_allocator=None):
        super().alloc_memory_pool(memory_pool_config, req_to_token_pool, token_to_kv_pool_allocator)
        self._held = None
        self.req_to_token = req_to_token_pool.req_to_token
        slots, drafts = self.req_to_token.shape[0], self.settings.max_stride - 1
        self.gate.reserve(slots * drafts, self.device)
        keep_q = self._keeps_q
        self.state = SlotState(slots, drafts, self.vocab, keep_q, self.device)
        self.counts = TokenCounts(slots, self.vocab, self.device)
        logger.info(
            "idlm: stride %s (up to %d), MASK %d, sampling rule %s, salvage %s, step ops %s, memory for q %.1f MB, for token counts %.1f MB, %d slots",
            AUTO if self.auto else self.stride,
            self.settings.max_stride,
            self.mask_id,
            self.settings.sampling_rule,
            self.settings.salvage,
            self.settings.step_ops,
            SlotState.q_bytes(slots, drafts, self.vocab) / 2**20 if keep_q else 0.0,
            self.counts.counts.nbytes / 2**20,
            slots,
        )

    def init_cuda_graphs(self):
        if self.masks is not None and not masks.check(self.model_runner.attn_backend):
            self.masks = self.model_runner.idlm_masks = None
        graphs.ready(self.model_runner, self.settings)
        self.gate.keep_eager(getattr(self.model_runner, "prefill_cuda_graph_runner", None))

    def prewarm_sampling(self):
        # The last thing before the pools are handed to the scheduler: everything a step needs is there.
        result = super().prewarm_sampling()
        if self.settings.auto:
            strides = ladder(self.settings.max_stride)
            largest = min(self.model_runner.max_running_requests, max(self._most_rows // self.settings.max_width, 1))
            times = measure(self, strides, largest, _MEASURING)
            totals = None if self.metrics is None else self.metrics.totals
            self.control = StrideControl(StepTimes(times), strides, self.device == "cpu", get_parallel().tp_group, totals, self.settings.salvage != OFF)
            if self.metrics is not None:
                self.metrics.on_step = self.control.rounds
        return result

    def set_stride(self, stride: int) -> None:
        """Use another stride from the next step on; drafts in flight are kept as far as they fit.

        Not between a step's allocation and its forward: KV is reserved for the stride in use.
        """
        if stride != self.stride:
            self.stride = stride
            self._rows.clear()

    def stride_for(self, requests: int) -> int:
        """The stride of a step of that many requests: where the controller chose it, its logits fit. A batch may grow faster
        than it decides."""
        return min(self.stride, self._most_for(requests))

    def _most_for(self, requests: int) -> int:
        """The largest stride whose logits fit, a request's own choice included, where the controller chooses."""
        return max((self._most_rows // requests + 1) // 2, 1) if self.auto else MAX_STRIDE

    def agreed(self, value: int) -> int:
        """The first tensor-parallel rank's ``value``, on all of them."""
        return agreed(get_parallel().tp_group, value)

    def columns_ahead(self, reqs, overlap: bool) -> int:
        """KV columns that a decode step of ``reqs`` needs behind what is known to be committed.

        Its own 2N - 1 rows; with the overlap schedule the step before it, whose result is not known yet, may commit up to
        its stride. At stride 1 that is what SGLang allocates for AR.
        """
        drafts = 0
        if self.stride > 1 or not all(map(_follows_server, reqs)):
            drafts = max((stride_limit(plan_of(req, self.settings, self.server_seed), self.settings, self.stride) for req in reqs), default=0)
            room = reserve.room_of(reqs)
            drafts = drafts if room is None else min(drafts, room)
        return 2 * drafts + 1 + (self._in_flight if overlap else 0)

    # A decode step in a prefill's forward (engine.beside), asked for by compat.beside.

    def join(self, batch) -> None:
        """The next forward, a prefill, takes the step of this prepared decode batch along where it can."""
        if can_join(batch, self.rows_of(batch)):
            self._partner = batch

    # One batch.

    def forward_batch_generation(self, batch, on_publish=None, pp_proxy_tensors=None):
        if self.device != "cpu":
            record_stream_for_v2_verify(batch, None, torch.get_device_module(self.device).current_stream())
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
            if self.control is not None:
                self.control.other()
            return self.phases.whole(PREFILL, self._extend, batch, on_publish)
        return self.phases.decode(self._controlled, batch, on_publish)

    def _controlled(self, batch, on_publish):
        """A decode step, with the controller told of it; a change of stride is for the steps behind it."""
        rows, control, size = self.rows_of(batch), self.control, len(batch.reqs)
        self._in_flight = rows.drafts + 1
        self.strides.step(self._in_flight)
        result, self._done = self._done, None
        chosen = control is not None and self.auto and rows.follows and reserve.room_of(batch.reqs) is None
        if control is not None and not chosen:
            control.other()
        if result is not None:
            self.strides.mixed()
        else:
            if chosen:
                control.start(size, self._in_flight)
            result = self.decode(batch, on_publish, rows)
            if chosen:
                control.end()
        stride = control.decide(size) if chosen else None
        if stride is not None:
            self.set_stride(stride)
            self.strides.gains(*control.gains())
        return result

    def decode(self, batch, on_publish=None, rows: BatchRows | None = None):
        """One decode step at the stride in use, in a forward of its own. ``rows``: the batch's, where they are known."""
        rows = rows or self.rows_of(batch)
        if not rows.drafts:
            return SingleStep(self, batch, rows).run(on_publish)
        step = StridedStep(self, batch, rows, self.settings.salvage)
        return step.finish(*step.verify(), on_publish)

    def rows_of(self, batch) -> BatchRows:
        """The requests of a decode batch, or of a prefill batch that gets its first drafts."""
        plans = [plan_of(req, self.settings, self.server_seed) for req in batch.reqs]
        stride, most, room = self.stride_for(len(plans)), self._most_for(len(plans)), reserve.room_of(batch.reqs)
        most = most if room is None else min(most, room + 1)
        key = (stride, most, *(plan.number for plan in plans))
        if key not in self._rows:
            if len(self._rows) == _KEPT_ROWS:
                self._rows.pop(next(iter(self._rows)))
            self._rows[key] = BatchRows(batch.reqs, plans, self.settings, stride, self.vocab, self.device, most)
        return self._rows[key]

    def _extend(self, batch, on_publish):
        slots, seq_lens = batch.req_pool_indices, batch.seq_lens
        penalised = penalised_rows(batch.reqs, self.vocab, self.device)
        if penalised is not None:
            self._restart_counts(batch, penalised)
            self.give_penalties(batch, penalised, seq_lens)
        masked, partner = masked_rows(batch), self._partner
        rows = self.rows_of(batch) if masked else None
        if rows is None or not rows.drafts:
            masked = []
        self.state.clear(slots)
        self._partner = None
        if masked or partner is not None:
            result, self._done = prefill(self, batch, masked, rows, partner)
        else:
            result = self._target_worker.forward_batch_generation(batch)
        if penalised is not None:
            self.count(batch, penalised, result.next_token_ids.to(torch.int64).view(-1, 1), torch.ones_like(seq_lens))
        result.new_seq_lens = seq_lens
        result.next_draft_input = IsdDraftInput(result.next_token_ids.to(torch.int64), seq_lens)
        if on_publish is not None:
            on_publish(seq_lens)
        return result

    # Penalties.

    def _restart_counts(self, batch, penalised) -> None:
        """Requests being prefilled are counted anew from the host, which knows all their tokens; decode rows go on."""
        decoding = {id(req) for req in batch.decoding_reqs or ()}
        rows = [i for i in penalised.rows if id(batch.reqs[i]) not in decoding]
        if rows:
            slots = batch.req_pool_indices[on_device(torch.tensor(rows, dtype=torch.int64), self.device)]
            self.counts.restart(slots, [list(batch.reqs[i].output_ids) for i in rows])

    def give_penalties(self, batch, penalised, seq_lens) -> None:
        """Leave the penalties where SGLang's sampler takes them from (a copy of the batch's that lives for one forward)."""
        info, index = batch.sampling_info, penalised.index
        counts = self.counts.of(batch.req_pool_indices[index])
        next_index = seq_lens[index] - penalised.prompt_lens
        info.acc_additive_penalties, info.acc_scaling_penalties = sampler_terms(penalised, counts, next_index, len(batch.reqs))

    def count(self, batch, penalised, tokens, lens) -> None:
        """Add the first ``lens`` ``(B,)`` of ``tokens`` ``(B, n)`` to the counts of the penalised rows."""
        index = penalised.index
        self.counts.add(batch.req_pool_indices[index], tokens[index], lens[index])
