"""KV columns for decode steps: what the worker asks for, and what requests are given ahead of it.

The process's worker is known here, for the scheduler's KV allocation, which knows batches and no worker.
"""

from idlm_sglang.engine.masks import note_columns

# Columns that a request is given at a time beyond its next step's own, so that the steps behind it allocate nothing, and the
# part of the free KV slots that these may take, all requests together.
AHEAD = 32
_PART = 16

_worker = None


def serve(worker) -> None:
    """``worker`` decides from now on."""
    global _worker
    _worker = worker


def columns(reqs, overlap: bool) -> int | None:
    """See ``IsdWorker.columns_ahead``; None where no worker serves."""
    return None if _worker is None else _worker.columns_ahead(reqs, overlap)


def allocated(batch) -> None:
    """The slots of a decode step of ``batch`` are there."""
    if _worker is not None and _worker.masks is not None:
        note_columns(batch)


def need_alone(batch, req, page_size: int) -> int:
    """KV slots to be taken for the next step of the one request that is left. Where the pool has fewer the request's steps are narrowed, as far as one token:
    so its answer may grow to the pool's end, as in AR."""
    pool = batch.token_to_kv_pool_allocator
    req.idlm_room = None
    need = _need(req, ahead := columns([req], batch.enable_overlap), page_size)
    if need == 0 or need <= (free := pool.available_size() + batch.tree_cache.evictable_size()):
        return need
    room = (ahead - 1) // 2
    while need > free and room > 0:
        room -= 1
        req.idlm_room = room
        need = _need(req, columns([req], batch.enable_overlap), page_size)
    return need


def widen(reqs) -> None:
    """Requests that are prefilled, anew perhaps, are as wide as any."""
    for req in reqs:
        req.idlm_room = None


def room_of(reqs) -> int | None:
    """The most drafts that there is room for, where :func:`need_alone` found the pool short; None: any number."""
    return getattr(reqs[0], "idlm_room", None) if len(reqs) == 1 else None


def _need(req, ahead: int, page_size: int) -> int:
    kv = req.kv
    whole = [-(-length // page_size) * page_size for length in (kv.kv_committed_len + ahead, kv.kv_allocated_len)]
    return max(whole[0] - whole[1], 0)


def in_hand(reqs, ahead: int, page_size: int) -> bool:
    """Whether every request has ``ahead`` columns behind its committed ones already, in whole pages."""
    return all(req.kv.kv_allocated_len >= -(-(req.kv.kv_committed_len + ahead) // page_size) * page_size for req in reqs)


def to_spare(batch, ahead: int) -> int:
    """Columns beyond the ``ahead`` of its next step that each request of a batch may be given now: :data:`AHEAD`, up to the end of its page-table
    row and to what the longest answer may still take; none where the pool is short."""
    pool, reqs = batch.token_to_kv_pool_allocator, batch.reqs
    free = pool.available_size() + batch.tree_cache.evictable_size()
    if not reqs or free < _PART * len(reqs) * (ahead + AHEAD + pool.page_size - 1):
        return 0
    row = batch.req_to_token_pool.req_to_token.shape[1]
    room = row - max(req.kv.kv_committed_len for req in reqs) - ahead - pool.page_size + 1
    left = max(req.sampling_params.max_new_tokens - len(req.output_ids) for req in reqs)
    return max(min(AHEAD, room, left), 0)
