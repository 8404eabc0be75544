"""What a forward changes on a batch, and is undone behind it."""

import dataclasses
from collections.abc import Callable
from functools import cache

from idlm_sglang.compat.running import is_isd


def isolated_at_once(original: Callable, scheduler, batch, *, overlap: bool):
    """What: ``Scheduler._forward_isolation`` reads and restores the fields of a batch in one operation each.
    Why: SGLang goes through some hundred fields one by one, for speculative algorithms alone: 1.5 % of a step of the embedded
    checkpoint at stride 1, which is to cost what AR costs.
    Guard: the hook applied; a test changes every field under SGLang's own and under this one.
    Goes when: SGLang does so, or a worker may say that it changes nothing.
    """
    return _Isolation(scheduler, batch, overlap) if is_isd() else original(scheduler, batch, overlap=overlap)


@cache
def _fields(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


class _Isolation:
    def __init__(self, scheduler, batch, overlap: bool):
        self._scheduler, self._batch, self._overlap = scheduler, batch, overlap

    def __enter__(self) -> None:
        batch, values = self._batch, vars(self._batch)
        self._before = {name: values[name] for name in _fields(type(batch))}
        if batch.sampling_info is not None:
            batch.sampling_info = batch.sampling_info.copy_for_forward()
        if self._overlap:
            self._scheduler.record_batch_in_overlap(batch)

    def __exit__(self, *_) -> None:
        vars(self._batch).update(self._before)
