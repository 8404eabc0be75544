"""On PYTHONPATH of a server that is to be slower: each pass of SGLang's scheduler takes ``PLANTED_SLOWDOWN`` more of its time."""

import os
import sys
import time

_SHARE = float(os.environ.get("PLANTED_SLOWDOWN", "0"))
_IDLE = 0.1  # seconds between two passes behind which the scheduler was idle, not slow


def _slow(scheduler) -> None:
    run, last = scheduler.run_batch, [0.0]

    def slower(self, *args, **kwargs):
        since = time.perf_counter() - last[0]
        if since < _IDLE:
            # Awake: a sleeping process wakes late, and with cold caches.
            until = time.perf_counter() + since * _SHARE
            while time.perf_counter() < until:
                pass
        last[0] = time.perf_counter()
        return run(self, *args, **kwargs)

    scheduler.run_batch = slower


class _AfterImport:
    """Changes the scheduler's module once it is loaded; nothing is imported earlier than it would be."""

    def find_spec(self, name, path=None, target=None):
        if name != "sglang.srt.managers.scheduler":
            return None
        sys.meta_path.remove(self)
        import importlib.util

        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def then(module):
            execute(module)
            _slow(module.Scheduler)

        spec.loader.exec_module = then
        return spec


if _SHARE:
    sys.meta_path.insert(0, _AfterImport())
