"""Every patch on SGLang, in one place: what, why, guard, and when it can go.

All go through SGLang's own ``HookRegistry``; a property, which that cannot hook, is replaced. A hook that fails to apply
is only logged there, so :func:`assert_applied` is called before serving and again when the worker is built.
"""

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace

from idlm_sglang import platform
from idlm_sglang.compat.beside import decode_beside_prefill, finish_both
from idlm_sglang.compat.calls import parse_tag_by_tag, parse_to_the_end
from idlm_sglang.compat.ends import (
    defer_reasoning,
    finish_token_by_token,
    grammar_behind_end,
    grammar_waits,
)
from idlm_sglang.compat.figures import (
    attach_report,
    count_before_answers,
    count_decode,
    flush_past_checks,
    make_room,
    offer_for_selfcheck,
    own_accept_rate,
    own_figures,
    report_in_meta_info,
    state_report,
    stride_handler,
)
from idlm_sglang.compat.graphs import graphs_by_stride, room_behind_context, rows_of_graphs, verify_input_of_dummies, verify_runs_by_call
from idlm_sglang.compat.isolation import isolated_at_once
from idlm_sglang.compat.live import add_live_page
from idlm_sglang.compat.outputs import embeds_by_row, find_prompt_logprobs, keep_output, own_prompt_logprobs, search_in_time, send_what_is_new
from idlm_sglang.compat.requests import (
    admit,
    attach_seeds,
    few_choices,
    guard_processors,
    penalties_in_order,
    readable_expressions,
    refuse_in_http,
    scores_without_generating,
    token_keyed_sampler,
)
from idlm_sglang.compat.reserve import allocate_in_use, chunk_that_fits, need_in_use, note_chunk, reserve_in_use, retract_beside_chunk, room_for_masks
from idlm_sglang.compat.start import (
    compute_in_float32,
    model_class_on_demand,
    packed_anew,
    page_table_on_host,
    refuse_before_resolution,
    room_for_strides,
    serve_as_idlm,
    without_secrets,
)
from idlm_sglang.config import SettingError

SUPPORTED = ">=0.5.23,<0.5.24"


def check_version(found: str | None = None) -> None:
    """Raise :class:`SettingError` unless SGLang is in the tested range."""
    from packaging.specifiers import SpecifierSet

    found = version("sglang") if found is None else found
    if not SpecifierSet(SUPPORTED).contains(found, prereleases=True):
        raise SettingError(f"SGLang {found} is installed; this version of idlm-sglang supports {SUPPORTED}")



@dataclass(frozen=True)
class Patch:
    """One hook.

    Attributes:
        target: dotted path of the function in SGLang.
        kind: a ``HookType`` name; PROPERTY for a property, which the registry cannot hook; or MODULE for a function of another
            library as one module of SGLang sees it.
        hook: the function hooked in.
        parameters: for a replacement, the target's parameters it was written for.
    """

    target: str
    kind: str
    hook: Callable
    parameters: tuple[str, ...] = ()


PROPERTY, MODULE = "PROPERTY", "MODULE"

_SRT = "sglang.srt."
_RESULTS = _SRT + "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
_STREAMER = _SRT + "managers.scheduler_components.output_streamer"
_INTERNAL = _SRT + "managers.scheduler_components.internal_state.SchedulerInternalStateController"
_WEIGHTS = _SRT + "model_executor.model_runner_components.weight_updater.WeightUpdater"
_MODEL_RUNNER = _SRT + "model_executor.model_runner.ModelRunner"
_TOKENIZER = _SRT + "managers.tokenizer_manager.TokenizerManager"

PATCHES = (
    Patch(_SRT + "mem_cache.allocation_sizing.get_req_to_token_extra_context_len", "AFTER", room_for_strides),
    Patch(_SRT + "mem_cache.allocation_sizing.get_alloc_reserve_per_decode", "AROUND", reserve_in_use),
    Patch(_SRT + "speculative.spec_utils.spec_prepare_for_decode", "AROUND", allocate_in_use),
    Patch(_SRT + "managers.schedule_batch.ScheduleBatch._new_tokens_required_next_decode_spec_v2", "AROUND", need_in_use),
    Patch(_SRT + "mem_cache.prefill_budget.PrefillBudget.available_chunk_tokens", "AROUND", chunk_that_fits),
    Patch(_SRT + "managers.scheduler.Scheduler.update_running_batch", "AROUND", note_chunk),
    Patch(_SRT + "managers.schedule_batch.ScheduleBatch.retract_decode", "AROUND", retract_beside_chunk),
    Patch(_SRT + "model_executor.forward_batch_info.ForwardBatch.init_new", "AFTER", attach_seeds),
    Patch(_STREAMER + "._GenerationStreamAccumulator.to_payload", "BEFORE", attach_report),
    Patch(_STREAMER + "._GenerationStreamAccumulator.accept", "AROUND", send_what_is_new),
    Patch(_SRT + "managers.schedule_batch.Req.reset_for_retract", "AROUND", keep_output),
    Patch(_SRT + "managers.schedule_batch.ScheduleBatch.prepare_for_extend", "AFTER", embeds_by_row),
    Patch(_SRT + "function_call.function_call_parser.FunctionCallParser.parse_stream_chunk", "AROUND", parse_tag_by_tag),
    Patch(_SRT + "function_call.function_call_parser.FunctionCallParser.parse_stream_end", "AROUND", parse_to_the_end),
    Patch(_SRT + "managers.schedule_batch.re.search", MODULE, search_in_time),
    Patch(_TOKENIZER + ".update_request_meta_info", "AROUND", report_in_meta_info),
    Patch(_SRT + "layers.sampler.create_sampler", "AFTER", token_keyed_sampler),
    Patch(_SRT + "configs.model_config.ModelConfig.from_server_args", "AFTER", serve_as_idlm),
    Patch(_SRT + "model_loader.utils.get_model_architecture", "BEFORE", model_class_on_demand),
    Patch(_SRT + "arg_groups.pipeline.run_resolution_pipeline", "BEFORE", refuse_before_resolution),
    Patch(_SRT + "arg_groups.pipeline.run_resolution_pipeline", "BEFORE", compute_in_float32),
    Patch(_SRT + "entrypoints.engine._server_args_for_logging", "AFTER", without_secrets),
    Patch(_SRT + "managers.scheduler.Scheduler.is_disable_overlap_for_batch", "AFTER", grammar_waits),
    Patch(_SRT + "managers.scheduler.Scheduler._add_request_to_queue", "BEFORE", admit),
    Patch(_SRT + "sampling.sampling_params.SamplingParams.normalize", "AROUND", readable_expressions),
    Patch(_TOKENIZER + "._create_tokenized_object", "AFTER", refuse_in_http),
    Patch(_SRT + "managers.io_struct.GenerateReqInput._handle_parallel_sampling", "AFTER", few_choices),
    Patch(_SRT + "managers.schedule_batch.ScheduleBatch.prepare_for_extend", "AFTER", room_for_masks),
    Patch(_SRT + "managers.scheduler.Scheduler.run_batch", "AROUND", decode_beside_prefill),
    Patch(_SRT + "managers.scheduler.Scheduler.process_batch_result", "AROUND", finish_both),
    Patch(_SRT + "managers.scheduler.Scheduler._forward_isolation", "AROUND", isolated_at_once),
    Patch(_SRT + "managers.schedule_batch.Req.is_prefill_only", PROPERTY, scores_without_generating),
    Patch(_SRT + "sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch", "AFTER", guard_processors),
    Patch(_SRT + "sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator.__init__", "AROUND", penalties_in_order),
    Patch(_RESULTS + "._accept_grammar_tokens", "AROUND", grammar_behind_end),
    Patch(_RESULTS + "._maybe_update_reasoning_tokens", "AROUND", defer_reasoning),
    Patch(_SRT + "managers.schedule_batch.Req.update_finish_state", "AROUND", finish_token_by_token),
    Patch(_RESULTS + ".process_batch_result_decode", "AROUND", count_decode),
    Patch(_RESULTS + ".process_batch_result_prefill", "BEFORE", find_prompt_logprobs),
    Patch(_RESULTS + "._apply_prefill_logprobs", "AROUND", own_prompt_logprobs),
    Patch(_RESULTS + "._apply_chunked_prefill_logprobs", "AROUND", own_prompt_logprobs),
    Patch(_STREAMER + ".SchedulerOutputStreamer.stream_output", "BEFORE", count_before_answers),
    Patch(_TOKENIZER + "._calculate_spec_decoding_metrics", "AROUND", own_figures),
    Patch(_TOKENIZER + "._calculate_spec_decoding_metrics", "AFTER", offer_for_selfcheck),
    Patch(_TOKENIZER + ".flush_cache", "AROUND", flush_past_checks),
    Patch(_TOKENIZER + "._init_req_state", "BEFORE", make_room),
    Patch(_TOKENIZER + ".set_server_stop_hook", "BEFORE", add_live_page),
    Patch(_SRT + "managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter.report_decode_stats", "BEFORE", own_accept_rate),
    Patch(_MODEL_RUNNER + "._decode_cuda_graph_runner_cls", "AFTER", graphs_by_stride),
    Patch(_MODEL_RUNNER + ".max_shared_logits_buffer_rows", "AROUND", rows_of_graphs),
    Patch(_SRT + "model_executor.model_runner_components.attention_backend_setup._build_resolved_backend", "AFTER", room_behind_context),
    Patch(_SRT + "model_executor.runner.base_runner.create_dummy_verify_input", "AFTER", verify_input_of_dummies),
    Patch(_INTERNAL + "._update_handlers", "AFTER", stride_handler),
    Patch(_INTERNAL + "._add_speculative", "AFTER", state_report),
)


CPU_PATCHES = (
    Patch(
        _SRT + "mem_cache.allocation.assign_req_to_token_pool_func",
        "REPLACE",
        page_table_on_host,
        ("req_pool_indices", "req_to_token", "start_offset", "end_offset", "out_cache_loc", "batch_size"),
    ),
    Patch(_SRT + "model_executor.forward_batch_info.ForwardMode.is_cpu_graph", "AFTER", verify_runs_by_call),
    Patch(_WEIGHTS + ".update_weights_from_tensor", "AFTER", packed_anew),
    Patch(_WEIGHTS + ".load_weights_from_distributed", "AFTER", packed_anew),
    Patch(_WEIGHTS + ".update_weights_from_ipc", "AFTER", packed_anew),
)


def cpu_patches() -> tuple[Patch, ...]:
    """What SGLang needs on the CPU platform, with any algorithm; nothing elsewhere."""
    return CPU_PATCHES if platform.activate() is not None else ()


def patches() -> tuple[Patch, ...]:
    """What this machine needs: the CPU platform has patches of its own."""
    return PATCHES + cpu_patches()


def register_patches(wanted: tuple[Patch, ...] | None = None) -> None:
    """Queue patches (all by default) with SGLang's hook registry, each once; SGLang applies them once all plugins are loaded.

    Raises:
        SettingError: a function to be replaced is not the one that the replacement was written for.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for patch in patches() if wanted is None else wanted:
        if any(hook is patch.hook for _, hook, _ in HookRegistry._hooks.get(patch.target, ())):
            continue
        if patch.parameters:
            found = tuple(inspect.signature(pkgutil.resolve_name(patch.target)).parameters)
            if found != patch.parameters:
                raise SettingError(f"SGLang {version('sglang')}: {patch.target} takes {found}; allowed: {patch.parameters}")
        if patch.kind == PROPERTY:
            _replace_property(patch)
        elif patch.kind == MODULE:
            _replace_in_module(patch)
        else:
            HookRegistry.register(patch.target, patch.hook, HookType[patch.kind])


def _replace_property(patch: Patch) -> None:
    owner, name = patch.target.rsplit(".", 1)
    if not isinstance(inspect.getattr_static(pkgutil.resolve_name(owner), name), property):
        raise SettingError(f"SGLang {version('sglang')}: {patch.target} is no property any more")
    setattr(pkgutil.resolve_name(owner), name, property(patch.hook))


def _replace_in_module(patch: Patch) -> None:
    owner, name = patch.target.rsplit(".", 1)
    module, seen = owner.rsplit(".", 1)
    library = getattr(pkgutil.resolve_name(module), seen, None)
    if not callable(getattr(library, name, None)):
        raise SettingError(f"SGLang {version('sglang')}: {module} has no {seen}.{name} any more")
    setattr(pkgutil.resolve_name(module), seen, SimpleNamespace(**{**vars(library), name: patch.hook}))


def _taken(patch: Patch) -> bool:
    from sglang.srt.plugins.hook_registry import HookRegistry

    if patch.kind == MODULE:
        return pkgutil.resolve_name(patch.target) is patch.hook
    if patch.kind == PROPERTY:
        owner, name = patch.target.rsplit(".", 1)
        return getattr(inspect.getattr_static(pkgutil.resolve_name(owner), name), "fget", None) is patch.hook
    return patch.target in HookRegistry._patched


def assert_applied() -> None:
    """Raise :class:`SettingError` if a patch did not take: serving on would be wrong, not merely slower."""
    wanted = patches()
    missing = [patch.target for patch in wanted if not _taken(patch)]
    if missing:
        raise SettingError(
            f"SGLang {version('sglang')} did not take {len(missing)} of {len(wanted)} hooks ({', '.join(missing)}); "
            f"the log above says why. Allowed: a plain SGLang {SUPPORTED}"
        )
