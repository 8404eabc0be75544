"""What is counted and reported, the self-check, and the stride that can be changed while serving."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from idlm_sglang.compat.running import is_isd

# The counters of the rank that counts, while a decode step of ISD is processed.
_counting = None


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
    from idlm_sglang.engine.trace import TRACE, collected

    reports = customized_info.get(REPORT)
    if reports is None:
        return original(manager, meta_info, state, customized_info, index, *rest)
    others = {key: values for key, values in customized_info.items() if key != REPORT}
    out = original(manager, meta_info, state, others, index, *rest)
    report = reports[index]
    if TRACE in report:
        report = {**report, TRACE: collected(state, report[TRACE])}
    meta_info.update(report)
    return out


def count_decode(original: Callable, processor, batch, result) -> Any:
    """What: ``SchedulerBatchResultProcessor.process_batch_result_decode`` is counted around.
    Why: only there is known what a step committed, behind stops, limits, aborts and overlap's extra step.
    Guard: the hook applied; the figures are compared with the answers in a test.
    Goes when: SGLang passes committed tokens per request to ``BaseSpecWorker``.
    """
    global _counting
    # An IsdResult alone has stats, of rounds or none.
    metrics = getattr(processor.draft_worker, "metrics", None) if hasattr(result, "round_stats") else None
    if metrics is None:
        return original(processor, batch, result)
    metrics.begin(batch, result)
    _counting = metrics
    try:
        return processor.draft_worker.phases.process(original, processor, batch, result)
    finally:
        _counting = None


def count_before_answers(*_, **__) -> None:
    """What: before ``SchedulerOutputStreamer.stream_output`` the step that is being processed is counted.
    Why: all its tokens are appended and trimmed there, and a finished answer leaves with its figures: who has it finds it counted.
    Guard: the hook applied; each answer's figures are compared with the counters in a test.
    Goes when: with the hook above.
    """
    if _counting is not None:
        _counting.end()


def own_figures(original: Callable, manager, meta_info: dict, recv_obj, i: int) -> Any:
    """What: ``TokenizerManager._calculate_spec_decoding_metrics`` leaves the ISD figures in ``meta_info`` alone.
    Why: it takes every one of a step's 2N - 2 rows behind the first for a proposed draft, and counts drafts behind a stop as accepted.
    Guard: the hook applied; each answer's figures are compared with the counters in a test.
    Goes when: a speculative worker reports proposed drafts per request.
    """
    return None if is_isd() else original(manager, meta_info, recv_obj, i)


def own_accept_rate(reporter, *_, **__) -> None:
    """What: before ``SchedulerMetricsReporter.report_decode_stats`` its sums become those of the ISD counters.
    Why: the log line and ``sglang:spec_accept_*`` divide by 2N - 2 drafts per row, and count rows of finished requests.
    Guard: the hook applied; the log line's rate is compared with the counters in a test.
    Goes when: with the hook above.
    """
    if reporter.forward_ct_decode % reporter.decode_log_interval or not is_isd():
        return
    metrics = reporter.scheduler.draft_worker.metrics
    if metrics is None:
        return
    from sglang.srt.runtime_context import get_spec

    tokens, rounds, proposed, accepted = metrics.interval()
    reporter.spec_num_accept_tokens = tokens
    # Only rows of finished requests: SGLang's own count keeps its division defined.
    reporter.spec_num_forward_ct = rounds or reporter.spec_num_forward_ct
    taken_for_proposed = reporter.spec_num_forward_ct * (get_spec().speculative_num_draft_tokens - 1)
    reporter.spec_num_correct_drafts = accepted / proposed * taken_for_proposed if proposed else 0


def offer_for_selfcheck(_, manager, meta_info: dict, *__) -> None:
    """What: after that the finished answer is offered to the self-check.
    Why: here ``meta_info`` is whole and the request's state still known, streamed or not, whatever the endpoint.
    Guard: the hook applied; the self-check's counters are compared with the answers in a test.
    Goes when: SGLang tells plugins of finished requests.
    """
    if not is_isd():
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


async def flush_past_checks(original: Callable, manager, *args, **kwargs) -> Any:
    """What: ``TokenizerManager.flush_cache`` lets a running self-check end first.
    Why: the cache is flushed only while nothing runs, and an operator who sees no request must not be refused.
    Guard: the hook applied; a test flushes under checks.
    Goes when: with the hook above.
    """
    checker = getattr(manager, "idlm_selfcheck", None)
    if checker is not None:
        await checker.give_way()
    return await original(manager, *args, **kwargs)


def stride_handler(handlers: dict, state) -> dict | None:
    """What: ``/set_internal_state`` takes ``idlm_stride``, and no longer the relaxed acceptance thresholds.
    Why: one running server covers every stride; exact acceptance has no knob.
    Guard: the hook applied; a test switches under load.
    Goes when: SGLang lets a worker contribute handlers.
    """
    if not is_isd():
        return None
    from sglang.srt.managers.scheduler_components.internal_state import UpdateRejected, _UpdateHandler

    worker = state.scheduler.draft_worker

    def validate(key: str, value: Any) -> None:
        # SGLang takes numbers alone: 0 stands for auto.
        low, top = int(worker.control is None), worker.settings.max_stride
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= top:
            raise UpdateRejected(f"{key}={value!r} is not valid; allowed: an integer from {low} to {top}")

    def apply(key: str, value: Any) -> None:
        worker.auto = value == 0
        if not worker.auto:
            worker.set_stride(value)

    kept = {k: v for k, v in handlers.items() if not k.startswith("speculative_accept_threshold")}
    return kept | {"idlm_stride": _UpdateHandler(validate, apply)}


def state_report(_, state, report: dict) -> None:
    """What: ``/server_info`` shows this plugin's version and the ISD counters under ``idlm``.
    Why: they are what an operator asks first; and whose sampler a seed belongs to is not to be seen otherwise.
    Guard: the hook applied; a test reads it.
    Goes when: SGLang lets a worker contribute state.
    """
    worker = state.scheduler.draft_worker
    report["idlm"] = {"version": version("idlm-sglang")}
    if is_isd() and worker.metrics is not None:
        totals = worker.metrics.totals.as_dict()
        strides = {"stride": worker.stride, "max_stride": worker.settings.max_stride, "auto": worker.auto}
        strides["steps_by_stride"] = {str(n): count for n, count in sorted(worker.strides.steps.items())}
        if worker.control is not None:
            strides["controller"] = worker.control.as_dict()
        load = {"running": len(state.scheduler.running_batch.reqs), "queued": len(state.scheduler.waiting_queue)}
        seconds = {phase: round(total, 6) for phase, total in worker.phases.seconds.items()}
        report["idlm"] |= {**strides, **totals, **load, "step_seconds": seconds, "timed_steps": worker.phases.steps}
        if totals["tokens_per_forward"] is not None:
            report["avg_spec_accept_length"] = totals["tokens_per_forward"]
