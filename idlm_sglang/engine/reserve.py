"""The process's ISD worker, for the scheduler's KV allocation, which knows batches and no worker."""

_worker = None


def serve(worker) -> None:
    """``worker`` decides from now on."""
    global _worker
    _worker = worker


def columns(reqs, overlap: bool) -> int | None:
    """See ``IsdWorker.columns_ahead``; None where no worker serves."""
    return None if _worker is None else _worker.columns_ahead(reqs, overlap)
