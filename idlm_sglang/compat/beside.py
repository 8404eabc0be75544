"""A decode step of the running requests in a prefill's forward."""

from collections.abc import Callable

from idlm_sglang.compat.running import is_isd

_WAITING = "idlm_waiting"


def decode_beside_prefill(original: Callable, scheduler, batch, *args, **kwargs):
    """What: ``Scheduler.run_batch``, given a prefill while requests are running, also prepares the running batch's decode step
    and hands it to the worker first; the prefill's forward computes it.
    Why: a stride makes answers short in forwards, and SGLang stops all of them for each prefill. Its own mixed batches give
    a decoding request one row.
    Guard: the hook applied; the normal loop alone (no overlap schedule, pipeline or disaggregation, one attention group); a
    step that finds no room stays with SGLang, which may have to retract.
    Goes when: SGLang's mixed batches carry a speculative algorithm's rows.
    """
    running = scheduler.running_batch
    setattr(scheduler, _WAITING, None)
    if is_isd() and _may_join(scheduler, batch, running):
        prepared = scheduler.update_running_batch(running)
        if prepared is not None and not prepared.is_empty():
            setattr(scheduler, _WAITING, prepared)
            scheduler.draft_worker.join(prepared)
    return original(scheduler, batch, *args, **kwargs)


def finish_both(original: Callable, scheduler, batch, result) -> None:
    """What: ``Scheduler.process_batch_result``, behind such a prefill, runs and processes the decode step that was prepared.
    Why: with the hook above; the worker has its result, or runs it now where it could not join.
    Guard: with the hook above.
    Goes when: with the hook above.
    """
    original(scheduler, batch, result)
    waiting = getattr(scheduler, _WAITING, None)
    if waiting is not None and waiting is not batch:
        setattr(scheduler, _WAITING, None)
        scheduler.process_batch_result(waiting, scheduler.run_batch(waiting))


def _may_join(scheduler, batch, running) -> bool:
    if batch is running or running.is_empty():
        return False
    from sglang.srt.disaggregation.utils import DisaggregationMode

    from idlm_sglang.engine.beside import takes_decode

    normal = not scheduler.enable_overlap and scheduler.disaggregation_mode == DisaggregationMode.NULL and not scheduler.require_mlp_sync
    return (
        normal
        and scheduler.draft_worker.settings.mixed_steps
        and not running.is_prefill_only
        and takes_decode(batch)
        and running.check_decode_mem()
    )
