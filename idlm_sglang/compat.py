"""Every patch on SGLang, in one place: what, why, guard, and when it can go.

All go through SGLang's own ``HookRegistry``. A hook that fails to apply is only logged there, so
:func:`assert_applied` is called before serving and again when the worker is built.
"""

import inspect
import logging
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from idlm_sglang import platform
from idlm_sglang.config import ALGORITHM, SettingError

logger = logging.getLogger(__name__)

SUPPORTED = ">=0.5.23,<0.5.24"


def check_version(found: str | None = None) -> None:
    """Raise :class:`SettingError` unless SGLang is in the tested range."""
    from packaging.specifiers import SpecifierSet

    found = version("sglang") if found is None else found
    if not SpecifierSet(SUPPORTED).contains(found, prereleases=True):
        raise SettingError(f"SGLang {found} is installed; this version of idlm-sglang supports {SUPPORTED}")


def _is_isd() -> bool:
    from sglang.srt.runtime_context import get_spec

    return get_spec().speculative_algorithm == ALGORITHM


# --- 1. Room in the request table --------------------------------------------------------------------------------


def room_for_strides(result: int) -> int:
    """What: ``get_req_to_token_extra_context_len`` returns at least the decode reserve.
    Why: at page size 1 it adds 4 + W columns while a decode step reserves 2W: rows overflow from W = 5 on.
    Guard: the hook applied; test with W >= 9 and a small context.
    Goes when: SGLang sizes the row by ``get_alloc_reserve_per_decode`` for every algorithm, as it does for UNO.
    """
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_page_size, get_alloc_reserve_per_decode

    if not _is_isd():
        return result
    return max(result, get_alloc_reserve_per_decode() + get_alloc_page_size() - 1)


# --- 2. Seeds ----------------------------------------------------------------------------------------------------


def attach_seeds(forward_batch, cls, batch, model_runner, **_) -> None:
    """What: ``ForwardBatch.init_new`` leaves the rows' noise keys on ``sampling_info.idlm_seeds``.
    Why: SGLang passes seeds to the sampler only under ``--enable-deterministic-inference``, and draws none of its own.
    Guard: the hook applied; seeded tests, and replays of unseeded answers at one token per step.
    Goes when: ``SamplingBatchInfo`` carries every request's seed.
    """
    info = batch.sampling_info
    if info is None:
        return
    info.idlm_seeds = None
    if info.sampling_seed is not None:
        return  # --enable-deterministic-inference in AR serving: SGLang's own seeds, batch-mates included
    if forward_batch.forward_mode.is_target_verify():
        return  # The worker has the seeds of its own step.
    import torch

    from idlm_sglang.engine.admission import plan_of
    from idlm_sglang.engine.requests import server_seed

    plans = [getattr(req, "idlm_plan", None) or plan_of(req, None, server_seed()) for req in batch.reqs]
    if not any(plan.coupled and req.sampling_params.top_k > 1 for plan, req in zip(plans, batch.reqs)):
        return
    host = torch.tensor([plan.seed for plan in plans], dtype=torch.int64)
    on_gpu = torch.device(batch.device).type == "cuda"
    info.idlm_seeds = (host.pin_memory() if on_gpu else host).to(batch.device, non_blocking=True)


def attach_report(acc, **_) -> None:
    """What: before ``_GenerationStreamAccumulator.to_payload`` the answers' seeds and figures join the payload.
    Why: ``customized_info`` is what SGLang carries to ``meta_info``; a plugin cannot subclass the streamer that fills it.
    Guard: the hook applied; tests read the seed from streamed, whole and OpenAI answers.
    Goes when: a speculative worker may add customized output.
    """
    from idlm_sglang.engine.report import REPORT, report

    reports = [report(req) for req in acc.output_reqs]
    if any(reports) and not acc.rust_server_mode:
        acc.customized_info[REPORT] = reports


def report_in_meta_info(original: Callable, manager, meta_info: dict, state, customized_info: dict, index: int, *rest) -> Any:
    """What: ``TokenizerManager.update_request_meta_info`` puts that report into ``meta_info`` as plain values.
    Why: SGLang collects customized values as lists with one entry per token.
    Guard: the hook applied; ``meta_info["seed"]`` is an int in every kind of answer.
    Goes when: ``customized_info`` has values per request.
    """
    from idlm_sglang.engine.report import REPORT

    reports = customized_info.get(REPORT)
    if reports is None:
        return original(manager, meta_info, state, customized_info, index, *rest)
    others = {key: values for key, values in customized_info.items() if key != REPORT}
    out = original(manager, meta_info, state, others, index, *rest)
    meta_info.update(reports[index])
    return out


def token_keyed_sampler(sampler, *_, **__):
    """What: ``create_sampler`` gives the stock sampler token-keyed noise for seeded batches.
    Why: the stock seeded draw depends on batch-mates and needs an op that CPU lacks.
    Guard: only an exact stock ``Sampler`` is replaced; a custom backend's is left alone.
    Goes when: SGLang's seeded sampling is keyed by token id.
    """
    from sglang.srt.layers.sampler import Sampler

    from idlm_sglang.engine.sampler import TokenKeyedSampler

    return TokenKeyedSampler() if type(sampler) is Sampler else sampler


# --- 3. Model class and configuration ----------------------------------------------------------------------------


def serve_as_idlm(config, server_args, *_, **kwargs) -> None:
    """What: ``ModelConfig.from_server_args`` maps I-DLM checkpoints to our class and fills in MASK.
    Why: ``SDARForCausalLM`` is SGLang's block-diffusion class; a plain Qwen3 checkpoint needs MASK removed under ISD.
    Guard: nothing changes for other architectures, nor with ``--dllm-algorithm``.
    Goes when: published checkpoints name an architecture of their own.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    from idlm_sglang import checkpoint
    from idlm_sglang.config import read_settings

    cfg = resolving_view(server_args)
    hf = config.hf_config
    names = list(hf.architectures or [])
    isd = (cfg.speculative_algorithm or "").upper() == ALGORITHM
    ours = {checkpoint.ARCHITECTURE, checkpoint.PUBLISHED_ARCHITECTURE} | ({checkpoint.AR_ARCHITECTURE} if isd else set())
    if cfg.dllm_algorithm is not None or not ours & set(names):
        return

    def load_tokenizer():
        from sglang.srt.utils.hf_transformers_utils import get_tokenizer

        return get_tokenizer(cfg.tokenizer_path or cfg.model_path, trust_remote_code=cfg.trust_remote_code, tokenizer_revision=cfg.revision)

    loader = None if cfg.skip_tokenizer_init else load_tokenizer
    hf.mask_token_id, _ = checkpoint.resolve_mask_token_id(hf, loader, read_settings().mask_token_id, hf.vocab_size)
    hf.architectures = [checkpoint.ARCHITECTURE]


def model_class_on_demand(*args, **kwargs) -> None:
    """What: before ``get_model_architecture`` looks a class up, ours is in ``ModelRegistry``.
    Why: registering at plugin load would import the model code in every process, HTTP and detokenizer included.
    Guard: the hook applied; without it the architecture name is unknown and the start fails.
    Goes when: ``ModelRegistry`` takes lazy entries.
    """
    from sglang.srt.models.registry import ModelRegistry

    from idlm_sglang.model import IDLMForCausalLM

    ModelRegistry.models[IDLMForCausalLM.__name__] = IDLMForCausalLM


# --- 4. What cannot be served ------------------------------------------------------------------------------------


def refuse_before_resolution(server_args) -> None:
    """What: before SGLang resolves its arguments, those that ISD does not serve are refused as typed.
    Why: a registered algorithm is asked late: until then some are rewritten (``--enable-dp-attention``), dropped
    (``--speculative-adaptive``), or fail elsewhere with a stack trace.
    Guard: the hook applied; the table of refusals in tests/serving.
    Goes when: ``CustomSpecAlgo.validate_server_args`` runs on the raw arguments.
    """
    from idlm_sglang.engine.algorithm import choose_backend, refuse_unserved

    if (server_args.speculative_algorithm or "").upper() == ALGORITHM:
        refuse_unserved(server_args)
        choose_backend(server_args)


def grammar_waits(result: bool, scheduler, batch, last_batch) -> bool:
    """What: ``Scheduler.is_disable_overlap_for_batch`` also waits before a mixed batch with a grammar.
    Why: it waits only before decode batches; a mixed one would sample with the automaton one token behind.
    Guard: the hook applied; grammars under overlap and mixed chunks are compared with AR.
    Goes when: the test in SGLang covers every batch that samples for a grammar request.
    """
    waiting = bool(batch) and batch.forward_mode.is_mixed() and batch.has_grammar and len(scheduler.result_queue) > 0
    return result or (_is_isd() and waiting)


# --- 5. Admission ------------------------------------------------------------------------------------------------


def admit(scheduler, req, is_retracted: bool = False) -> None:
    """What: ``Scheduler._add_request_to_queue`` first asks admission; a refused request ends as HTTP 400.
    Why: SGLang has no per-request hook for a registered algorithm, and an exception in the worker kills the server.
    Guard: the hook applied; refusal tests.
    Goes when: ``CustomSpecAlgo`` gets a ``validate_request``.
    """
    if not _is_isd() or is_retracted or req.to_finish is not None or getattr(req, "idlm_plan", None) is not None:
        return
    from idlm_sglang.engine.admission import defuse, plan_of
    from idlm_sglang.engine.requests import REFUSED

    worker = scheduler.draft_worker
    plan = plan_of(req, worker.settings, worker.server_seed)
    if worker.metrics is not None:
        worker.metrics.request(plan.mode, plan.reason)
    if plan.mode == REFUSED:
        req.set_finish_with_abort(plan.message)
        defuse(req)
        scheduler.init_req_max_new_tokens(req)


def refuse_in_http(tokenized, manager, obj, *_, **__) -> None:
    """What: after ``TokenizerManager._create_tokenized_object`` admission may refuse the request, as SGLang refuses bad ones.
    Why: from the scheduler a refusal comes too late for a stream, which has begun with HTTP 200.
    Guard: the hook applied; refusals are tested streamed and not.
    Goes when: with the hook above.
    """
    from sglang.srt.managers.io_struct import GenerateReqInput

    if not _is_isd() or not isinstance(obj, GenerateReqInput):
        return
    from idlm_sglang.config import handed_down
    from idlm_sglang.engine.admission import refusal
    from idlm_sglang.engine.metrics import requests_counter
    from idlm_sglang.engine.requests import REFUSED

    refused = refusal(tokenized, handed_down())
    if refused is None:
        return
    reason, message = refused
    if manager.enable_metrics:
        if not hasattr(manager, "idlm_requests"):
            manager.idlm_requests = requests_counter({"model_name": manager.served_model_name, "dp_rank": ""})
        manager.idlm_requests(mode=REFUSED, reason=reason).inc()
    raise ValueError(message)


def scores_without_generating(req) -> bool:
    """What: ``Req.is_prefill_only``, a property, is true for ``max_new_tokens`` 0 under ISD too.
    Why: SGLang switches it off for every speculative algorithm; ``/v1/score`` then reads the wrong positions. ISD runs a
    prefill as it is, and has nothing to lose there.
    Guard: the property is still one; scores are compared with AR.
    Goes when: SGLang asks the algorithm.
    """
    from sglang.srt.runtime_context import get_spec

    return req.sampling_params.max_new_tokens == 0 and get_spec().speculative_algorithm in (None, ALGORITHM)


# --- 6. Penalties ------------------------------------------------------------------------------------------------


def penalties_in_order(original: Callable, orchestrator, vocab_size: int, batch, penalizers) -> None:
    """What: ``BatchedPenalizerOrchestrator`` gets its penalizers in one order, additive ones first; under ISD it gets none.
    Why: it is given a set of classes, so that with the overlap schedule off a process applies a repetition penalty before
    or after the additive ones by chance. Under ISD the worker counts tokens on the device.
    Guard: the hook applied; penalties are compared with AR, two of a kind together.
    Goes when: SGLang gives it a list, and counts every token of a speculative step.
    """
    ordered = sorted(penalizers, key=lambda kind: (kind.is_multiplicative, kind.__name__))
    original(orchestrator, vocab_size, batch, () if _is_isd() else ordered)


# --- 7. Where an answer ends -------------------------------------------------------------------------------------


def grammar_behind_end(original: Callable, processor, req, tokens) -> list[int]:
    """What: ``_accept_grammar_tokens`` keeps a token that the grammar rejects, and leaves on the request that it did, and
    whether the grammar ended within these tokens.
    Why: AR looks for the end of the answer first and asks the grammar behind it; for a speculative run it is the other way
    round. A rejected token that ends the answer (forced by a custom processor, or where nothing else is allowed) is an
    answer there and an error here.
    Guard: the hook applied; such tokens, and ``ignore_eos`` behind a complete grammar, are compared with AR.
    Goes when: SGLang asks in AR's order.
    """
    if not _is_isd():
        return original(processor, req, tokens)
    ended, asked = req.grammar.is_terminated(), req.to_finish
    retained = original(processor, req, tokens)
    if req.to_finish is not asked and len(retained) < len(tokens):
        retained.append(tokens[len(retained)])
        req.idlm_grammar_error, req.to_finish = req.to_finish, asked
    req.idlm_grammar_just_ended = not ended and req.grammar.is_terminated()
    return retained


def defer_reasoning(original: Callable, processor, req, tokens) -> None:
    """What: ``_maybe_update_reasoning_tokens`` counts an accepted run once its end is known.
    Why: it is asked before the search for the end, and counts what stands behind a stop.
    Guard: the hook applied; usage of reasoning requests with stops inside a run is compared with AR.
    Goes when: SGLang counts after the search.
    """
    if isinstance(tokens, list) and len(tokens) > 1 and _is_isd():
        req.idlm_reasoning = partial(original, processor, req), tokens
    else:
        original(processor, req, tokens)


def finish_token_by_token(original: Callable, req, new_accepted_len: int = 1) -> None:
    """What: ``Req.update_finish_state`` sees an accepted run as AR would: one token after the other.
    Why: over a whole run it prefers a stop string to an end token in front of it, and the first stop string of the list to
    the first in the text; and a speculative run ends with its grammar, where AR adds one more token under ``ignore_eos``.
    Guard: the hook applied; stops in every order inside a run are compared with AR.
    Goes when: SGLang's own check does so.
    """
    grammar = req.grammar
    if getattr(req, "idlm_grammar_just_ended", False):
        req.grammar, req.idlm_grammar_just_ended = None, False
    try:
        _search_end(original, req, new_accepted_len)
    finally:
        req.grammar = grammar
        error = getattr(req, "idlm_grammar_error", None)
        if error is not None:
            req.idlm_grammar_error = None
            req.to_finish = req.to_finish if req.finished() else error
        count, run = getattr(req, "idlm_reasoning", None) or (None, None)
        if count is not None:
            req.idlm_reasoning = None
            beyond = 0 if req.finished_len is None else len(req.output_ids) - req.finished_len
            count(run[: len(run) - beyond])


def _search_end(original: Callable, req, new_accepted_len: int) -> None:
    params = req.sampling_params
    stops = params.stop_strs or params.stop_regex_strs
    if new_accepted_len <= 1 or not stops or req.finished() or req.to_finish is not None or not _is_isd():
        original(req, new_accepted_len)
        return
    run = req.output_ids[-new_accepted_len:]
    del req.output_ids[-new_accepted_len:]
    for i, token in enumerate(run):
        req.output_ids.append(token)
        original(req, 1)
        if req.finished():
            # SGLang leaves the length open where the last token is the last of the answer; here more follow.
            req.finished_len = len(req.output_ids) if req.finished_len is None else req.finished_len
            req.output_ids.extend(run[i + 1 :])
            return


# --- 8. Metrics --------------------------------------------------------------------------------------------------


def count_decode(original: Callable, processor, batch, result) -> Any:
    """What: ``SchedulerBatchResultProcessor.process_batch_result_decode`` is counted around.
    Why: only there is known what a step committed, behind stops, limits, aborts and overlap's extra step.
    Guard: the hook applied; the figures are compared with the answers in a test.
    Goes when: SGLang passes committed tokens per request to ``BaseSpecWorker``.
    """
    metrics = _step_metrics(processor, result)
    if metrics is None:
        return original(processor, batch, result)
    metrics.begin(batch)
    out = original(processor, batch, result)
    metrics.end()
    return out


def count_row(processor, req, batch, result, i: int, *_) -> None:
    """What: before ``SchedulerBatchResultProcessor._handle_finish_state_updated_req`` the row's step is counted.
    Why: a finished answer leaves with its figures before the step's processing ends.
    Guard: the hook applied; each answer's figures are compared with the counters in a test.
    Goes when: with the hook above.
    """
    metrics = _step_metrics(processor, result)
    if metrics is not None:
        metrics.row(req, result, i)


def _step_metrics(processor, result):
    """The counters of the rank that counts, for a decode step of ISD; else None."""
    from idlm_sglang.engine.spec_io import IsdResult

    return getattr(processor.draft_worker, "metrics", None) if isinstance(result, IsdResult) else None


def own_figures(original: Callable, manager, meta_info: dict, recv_obj, i: int) -> Any:
    """What: ``TokenizerManager._calculate_spec_decoding_metrics`` leaves the ISD figures in ``meta_info`` alone.
    Why: it takes every one of a step's 2N - 2 rows behind the first for a proposed draft, and counts drafts behind a stop as accepted.
    Guard: the hook applied; each answer's figures are compared with the counters in a test.
    Goes when: a speculative worker reports proposed drafts per request.
    """
    return None if _is_isd() else original(manager, meta_info, recv_obj, i)


def offer_for_selfcheck(_, manager, meta_info: dict, *__) -> None:
    """What: after that the finished answer is offered to the self-check.
    Why: here ``meta_info`` is whole and the request's state still known, streamed or not, whatever the endpoint.
    Guard: the hook applied; the self-check's counters are compared with the answers in a test.
    Goes when: SGLang tells plugins of finished requests.
    """
    if not _is_isd():
        return
    from idlm_sglang.config import handed_down
    from idlm_sglang.engine.selfcheck import checker_of

    checker = checker_of(manager, handed_down())
    state = manager.rid_to_state.get(meta_info["id"])
    if checker is not None and state is not None:
        checker.offer(state.obj, state.output_ids, meta_info)


def make_room(manager, obj, *_) -> None:
    """What: before ``TokenizerManager._init_req_state`` a running self-check is aborted for a client's request.
    Why: checks are for idle capacity; the scheduler hears of the abort before it hears of the request.
    Guard: the hook applied; a test counts checks under load.
    Goes when: SGLang's priority scheduling can preempt without a server flag.
    """
    checker = getattr(manager, "idlm_selfcheck", None)
    if checker is not None:
        checker.client_arrives(obj)


def own_accept_rate(reporter, *_, **__) -> None:
    """What: before ``SchedulerMetricsReporter.report_decode_stats`` its sums become those of the ISD counters.
    Why: the log line and ``sglang:spec_accept_*`` divide by 2N - 2 drafts per row, and count rows of finished requests.
    Guard: the hook applied; the log line's rate is compared with the counters in a test.
    Goes when: with the hook above.
    """
    metrics = getattr(reporter.scheduler.draft_worker, "metrics", None) if _is_isd() else None
    if metrics is None:
        return
    metrics.end()
    if reporter.forward_ct_decode % reporter.decode_log_interval:
        return
    from sglang.srt.runtime_context import get_spec

    tokens, rounds, proposed, accepted = metrics.interval()
    reporter.spec_num_accept_tokens = tokens
    # Only rows of finished requests: SGLang's own count keeps its division defined.
    reporter.spec_num_forward_ct = rounds or reporter.spec_num_forward_ct
    taken_for_proposed = reporter.spec_num_forward_ct * (get_spec().speculative_num_draft_tokens - 1)
    reporter.spec_num_correct_drafts = accepted / proposed * taken_for_proposed if proposed else 0


# --- 9. Switching the stride while serving -----------------------------------------------------------------------


def stride_handler(handlers: dict, state) -> dict | None:
    """What: ``/set_internal_state`` takes ``idlm_stride``, and no longer the relaxed acceptance thresholds.
    Why: one running server covers every stride; exact acceptance has no knob.
    Guard: the hook applied; a test switches under load.
    Goes when: SGLang lets a worker contribute handlers.
    """
    if not _is_isd():
        return None
    from sglang.srt.managers.scheduler_components.internal_state import UpdateRejected, _UpdateHandler

    worker = state.scheduler.draft_worker

    def validate(key: str, value: Any) -> None:
        top = worker.settings.max_stride
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= top:
            raise UpdateRejected(f"{key}={value!r} is not valid; allowed: an integer from 1 to {top}")

    def apply(key: str, value: Any) -> None:
        worker.set_stride(value)

    kept = {k: v for k, v in handlers.items() if not k.startswith("speculative_accept_threshold")}
    return kept | {"idlm_stride": _UpdateHandler(validate, apply)}


def state_report(_, state, report: dict) -> None:
    """What: ``/server_info`` shows the ISD counters under ``idlm``.
    Why: they are what an operator asks first.
    Guard: the hook applied; a test reads it.
    Goes when: SGLang lets a worker contribute state.
    """
    worker = state.scheduler.draft_worker
    if _is_isd() and worker.metrics is not None:
        totals = worker.metrics.totals.as_dict()
        report["idlm"] = {"stride": worker.stride, "max_stride": worker.settings.max_stride, **totals}
        if totals["tokens_per_forward"] is not None:
            report["avg_spec_accept_length"] = totals["tokens_per_forward"]


# --- 10. The CPU platform -----------------------------------------------------------------------------------------


def page_table_in_torch(*args, **kwargs) -> None:
    """What: ``assign_req_to_token_pool_func`` is torch indexing on the CPU platform.
    Why: off SGLang's own CPU engine it launches a Triton kernel, on every speculative decode step.
    Guard: the function still takes the parameters that the replacement was written for.
    Goes when: SGLang consults ``capabilities.supports_triton`` there, as its paged allocator does.
    """
    from idlm_sglang.platform.page_table import assign_req_to_token

    assign_req_to_token(*args, **kwargs)


@dataclass(frozen=True)
class Patch:
    """One hook.

    Attributes:
        target: dotted path of the function in SGLang.
        kind: a ``HookType`` name, or PROPERTY for a property, which the registry cannot hook.
        hook: the function hooked in.
        parameters: for a replacement, the target's parameters it was written for.
    """

    target: str
    kind: str
    hook: Callable
    parameters: tuple[str, ...] = ()


PROPERTY = "PROPERTY"

_SRT = "sglang.srt."
_RESULTS = _SRT + "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
_INTERNAL = _SRT + "managers.scheduler_components.internal_state.SchedulerInternalStateController"
_TOKENIZER = _SRT + "managers.tokenizer_manager.TokenizerManager"

PATCHES = (
    Patch(_SRT + "mem_cache.allocation_sizing.get_req_to_token_extra_context_len", "AFTER", room_for_strides),
    Patch(_SRT + "model_executor.forward_batch_info.ForwardBatch.init_new", "AFTER", attach_seeds),
    Patch(_SRT + "managers.scheduler_components.output_streamer._GenerationStreamAccumulator.to_payload", "BEFORE", attach_report),
    Patch(_TOKENIZER + ".update_request_meta_info", "AROUND", report_in_meta_info),
    Patch(_SRT + "layers.sampler.create_sampler", "AFTER", token_keyed_sampler),
    Patch(_SRT + "configs.model_config.ModelConfig.from_server_args", "AFTER", serve_as_idlm),
    Patch(_SRT + "model_loader.utils.get_model_architecture", "BEFORE", model_class_on_demand),
    Patch(_SRT + "arg_groups.pipeline.run_resolution_pipeline", "BEFORE", refuse_before_resolution),
    Patch(_SRT + "managers.scheduler.Scheduler.is_disable_overlap_for_batch", "AFTER", grammar_waits),
    Patch(_SRT + "managers.scheduler.Scheduler._add_request_to_queue", "BEFORE", admit),
    Patch(_TOKENIZER + "._create_tokenized_object", "AFTER", refuse_in_http),
    Patch(_SRT + "managers.schedule_batch.Req.is_prefill_only", PROPERTY, scores_without_generating),
    Patch(_SRT + "sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator.__init__", "AROUND", penalties_in_order),
    Patch(_RESULTS + "._accept_grammar_tokens", "AROUND", grammar_behind_end),
    Patch(_RESULTS + "._maybe_update_reasoning_tokens", "AROUND", defer_reasoning),
    Patch(_SRT + "managers.schedule_batch.Req.update_finish_state", "AROUND", finish_token_by_token),
    Patch(_RESULTS + ".process_batch_result_decode", "AROUND", count_decode),
    Patch(_RESULTS + "._handle_finish_state_updated_req", "BEFORE", count_row),
    Patch(_TOKENIZER + "._calculate_spec_decoding_metrics", "AROUND", own_figures),
    Patch(_TOKENIZER + "._calculate_spec_decoding_metrics", "AFTER", offer_for_selfcheck),
    Patch(_TOKENIZER + "._init_req_state", "BEFORE", make_room),
    Patch(_SRT + "managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter.report_decode_stats", "BEFORE", own_accept_rate),
    Patch(_INTERNAL + "._update_handlers", "AFTER", stride_handler),
    Patch(_INTERNAL + "._add_speculative", "AFTER", state_report),
)


CPU_PATCHES = (
    Patch(
        _SRT + "mem_cache.allocation.assign_req_to_token_pool_func",
        "REPLACE",
        page_table_in_torch,
        ("req_pool_indices", "req_to_token", "start_offset", "end_offset", "out_cache_loc", "batch_size"),
    ),
)


def patches() -> tuple[Patch, ...]:
    """What this machine needs: the CPU platform has patches of its own."""
    return PATCHES + (CPU_PATCHES if platform.activate() is not None else ())


def register_patches() -> None:
    """Queue every patch with SGLang's hook registry; SGLang applies them once all plugins are loaded.

    Raises:
        SettingError: a function to be replaced is not the one that the replacement was written for.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for patch in patches():
        if patch.parameters:
            found = tuple(inspect.signature(pkgutil.resolve_name(patch.target)).parameters)
            if found != patch.parameters:
                raise SettingError(f"SGLang {version('sglang')}: {patch.target} takes {found}; allowed: {patch.parameters}")
        if patch.kind == PROPERTY:
            _replace_property(patch)
        else:
            HookRegistry.register(patch.target, patch.hook, HookType[patch.kind])


def _replace_property(patch: Patch) -> None:
    owner, name = patch.target.rsplit(".", 1)
    if not isinstance(inspect.getattr_static(pkgutil.resolve_name(owner), name), property):
        raise SettingError(f"SGLang {version('sglang')}: {patch.target} is no property any more")
    setattr(pkgutil.resolve_name(owner), name, property(patch.hook))


def _taken(patch: Patch) -> bool:
    from sglang.srt.plugins.hook_registry import HookRegistry

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
