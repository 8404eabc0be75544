"""KV is reserved for the stride in use, not for the largest, and for some steps at a time; and a chunk takes what there is."""

import logging
from collections.abc import Callable

from idlm_sglang.compat.running import is_isd
from idlm_sglang.engine.reserve import allocated, columns, in_hand, need_alone, to_spare, widen

logger = logging.getLogger(__name__)

_columns: int | None = None
_chunk_held = False


def _reserving(ahead: int | None, call: Callable, *args):
    """``call(*args)`` under a reserve of that many columns; None: SGLang's own."""
    global _columns
    _columns = ahead
    try:
        return call(*args)
    finally:
        _columns = None


def _ahead(reqs, overlap: bool) -> int | None:
    """The columns that a decode step of ``reqs`` needs behind their committed ones; None where SGLang's reserve holds."""
    return columns(reqs, overlap) if is_isd() else None


def reserve_in_use(original: Callable) -> int:
    """What: ``get_alloc_reserve_per_decode``, while a step is allocated or its need is estimated, is that of its stride.
    Why: it is 2W columns at the largest stride; at stride 1 a short pool would hold fewer requests than in AR.
    Guard: the hook applied; a test compares stride 1 with AR on a short pool, another switches strides there.
    Goes when: SGLang asks the algorithm for the columns of a batch.
    """
    return original() if _columns is None else _columns


def allocate_in_use(original: Callable, batch) -> None:
    """What: ``spec_prepare_for_decode`` allocates under that reserve, and where the pool has plenty for some steps at a time; a step whose
    requests have all their columns allocates nothing.
    Why: with the hook above; and a step of stride 1, which is to cost what AR costs, should not allocate each time.
    Guard: with the hook above; a test compares a batch that allocates nothing with SGLang's own preparation of it.
    Goes when: with the hook above; SGLang skips an allocation of nothing.
    """
    ahead = _ahead(batch.reqs, batch.enable_overlap)
    if ahead is None:
        original(batch)
        return
    if batch.sampling_info.penalizer_orchestrator.is_required or not in_hand(batch.reqs, ahead, batch.token_to_kv_pool_allocator.page_size):
        spare = 0 if _preempts() else to_spare(batch, ahead)
        _reserving(ahead + spare, original, batch)
    else:
        batch.maybe_evict_swa()
        for req in batch.reqs:
            req.decode_batch_idx += 1
        if batch.seq_lens_cpu is None:
            batch.max_seq_len_host = max(req.kv.kv_allocated_len for req in batch.reqs)
    allocated(batch)


def _preempts() -> bool:
    """Whether a request of higher priority may take the place of a running one: SGLang's chunks are not bounded by the pool then."""
    from sglang.srt.runtime_context import get_schedule

    schedule = get_schedule()
    return schedule.enable_priority_scheduling and not schedule.disable_priority_preemption


def need_in_use(original: Callable, batch, requests, page_size: int) -> int:
    """What: ``ScheduleBatch._new_tokens_required_next_decode_spec_v2`` estimates under that reserve.
    Why: with the hook above; a need estimated too low would end the server at the allocation. Pages of one token need no rounding,
    which takes most of SGLang's time here, in every step. The last request that is left takes narrower steps where the pool comes to its end: SGLang would
    abort it for want of a step's columns, where AR goes on.
    Guard: with the hook above; tests compare both sums, and let an answer grow to the pool's end.
    Goes when: with the hook above.
    """
    if len(requests) == 1 and is_isd():
        return need_alone(batch, requests[0], page_size)
    ahead = _ahead(requests, batch.enable_overlap)
    if page_size == 1 and ahead is not None:
        return sum(max(req.kv.kv_committed_len + ahead - req.kv.kv_allocated_len, 0) for req in requests)
    return _reserving(ahead, original, batch, requests, page_size)


def room_for_masks(_, batch) -> None:
    """What: after ``ScheduleBatch.prepare_for_extend`` the requests whose prompt ends there get KV slots for MASK rows.
    Why: the forward that ends a prompt can draw the first drafts; SGLang allocates a decode step's slots only behind it.
    Guard: the hook applied; answers are compared with AR, and a test finds no cold step behind a prompt.
    Goes when: SGLang lets a speculative algorithm reserve slots at prefill.
    """
    if not is_isd():
        return
    from idlm_sglang.engine.warm import reserve

    widen(batch.reqs)
    _reserving(_ahead(batch.reqs, batch.enable_overlap), reserve, batch)


def chunk_that_fits(original: Callable, budget, chunk_limit: int) -> int | None:
    """What: ``PrefillBudget.available_chunk_tokens``, the size of a prompt's next chunk, is at most what the pool has left; with nothing
    left the prompt waits, as SGLang lets one wait whose sliding-window pool is full.
    Not with priority preemption.
    Why: where the running requests are expected to take the rest of the pool SGLang makes the chunk as long as it may be, free slots or
    not, and its allocation then ends the scheduler. In AR serving, too.
    Guard: the hook applied; a test on SGLang's own class; `make soak` runs into it.
    Goes when: SGLang bounds the chunk of a full pool.
    """
    found = original(budget, chunk_limit)
    # A request of higher priority may still be admitted where a chunk waits, and SGLang then counts the chunk as run.
    if found is None or _preempts():
        return found
    room = int(budget._available_and_evictable()) // budget.page_size * budget.page_size
    return min(found, room) if room > 0 else None


def note_chunk(original: Callable, scheduler, batch):
    """What: during ``Scheduler.update_running_batch`` it is known whether a prompt is in the midst of its chunks.
    Why: for the hook below, whose function does not see the scheduler.
    Guard: with the hook below.
    Goes when: with the hook below.
    """
    global _chunk_held
    if scheduler.chunked_req is None:
        return original(scheduler, batch)
    from sglang.srt.disaggregation.utils import DisaggregationMode

    _chunk_held = scheduler.disaggregation_mode == DisaggregationMode.NULL
    try:
        return original(scheduler, batch)
    finally:
        _chunk_held = False


def retract_beside_chunk(original: Callable, batch):
    """What: ``ScheduleBatch.retract_decode`` also retracts the last running request where a prompt's chunks hold the rest of the pool.
    Why: SGLang aborts the last one, since nothing else could make room. A prompt whose next chunk waits for room does hold some, and
    goes on once there is: the request then comes behind it. In AR serving, too.
    Guard: the hook applied; a test lets a prompt's chunks meet one long answer.
    Goes when: SGLang counts the chunk as one more request.
    """
    asked = {id(req): req.to_finish for req in batch.reqs}
    retracted, ratio, aborted = original(batch)
    if _chunk_held:
        for req in [req for req in aborted if req.beam_group is None and asked[id(req)] is None]:
            req.to_finish = None
            aborted.remove(req)
            retracted.append(req)
            # SGLang has just logged that it aborted it.
            logger.warning("idlm: request %s is not aborted but retracted: the chunks of a prompt hold the rest of the KV pool", req.rid)
    return retracted, ratio, aborted
