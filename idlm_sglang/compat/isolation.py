"""What a forward changes on a batch, and is undone behind it."""

import dataclasses
from collections.abc import Callable
from functools import cache
from operator import itemgetter

from idlm_sglang.compat.running import is_isd


def isolated_at_once(original: Callable, scheduler, batch, *, overlap: bool):
    """What: ``Scheduler._forward_isolation`` reads and restores the fields of a batch in one operation each, and copies its ``SamplingBatchInfo`` likewise.
    Why: SGLang goes through some hundred fields one by one, for speculative algorithms alone: 1.5 % of a step of the embedded
    checkpoint at stride 1, which is to cost what AR costs.
    Guard: the hook applied; a test changes every field under SGLang's own and under this one.
    Goes when: SGLang does so, or a worker may say that it changes nothing.
    """
    return _Isolation(scheduler, batch, overlap) if is_isd() else original(scheduler, batch, overlap=overlap)


@cache
def _fields(kind: type) -> tuple[tuple[str, ...], itemgetter]:
    """The names of a dataclass's fields, and what reads them all from an instance's ``vars``."""
    names = tuple(field.name for field in dataclasses.fields(kind))
    return names, itemgetter(*names)


def _for_forward(info):
    """``info.copy_for_forward()``, without the constructor."""
    info.update_penalties()
    names, values = _fields(type(info))
    copied = object.__new__(type(info))
    vars(copied).update(zip(names, values(vars(info))), penalizer_orchestrator=None)
    return copied


class _Isolation:
    def __init__(self, scheduler, batch, overlap: bool):
        self._scheduler, self._batch, self._overlap = scheduler, batch, overlap

    def __enter__(self) -> None:
        batch = self._batch
        self._before = vars(batch).copy()
        if batch.sampling_info is not None:
            batch.sampling_info = _for_forward(batch.sampling_info)
        if self._overlap:
            self._scheduler.record_batch_in_overlap(batch)

    def __exit__(self, *_) -> None:
        after, self._batch.__dict__ = vars(self._batch), self._before
        names, _ = _fields(type(self._batch))
        # Attributes that are no fields stay as the forward left them; commonly there are none.
        if not len(names) == len(after) == len(self._before):
            for name in (after.keys() | self._before.keys()).difference(names):
                if name in after:
                    self._before[name] = after[name]
                else:
                    del self._before[name]
