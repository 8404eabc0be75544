"""A trace of torch.profiler (Chrome format), attributed to the parts of a step.

Host ranges (:mod:`.ranges`) say which part is at work at any time. Without device events, a CPU's trace, they are the
answer. With them, each kernel, copy and fill is charged to the part that launched it, found by its correlation id; time in
which two run at once counts once, for the one that began first. Kernels of a CUDA graph have one launch for all: those are
told apart by name, and the last matrix product of the launch is the LM head.
"""

import gzip
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.step_time.parts import ATTENTION, GEMM, HOST, LM_HEAD, MODEL, PARTS, PREFIX, SETUP, STEP

DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
_ATTENTION_NAME = re.compile(r"attn|attention|flash|fmha|paged|decode.*stage[12]|_fwd_(grouped_)?kernel|set_kv|store_kv|store_cache", re.IGNORECASE)
_GEMM_NAME = re.compile(r"gemm|gemv|nvjet|xmma|cutlass|splitk|cublas|dot_kernel|_mm_", re.IGNORECASE)


@dataclass(frozen=True)
class Split:
    """Means over the whole decode steps of a trace.

    Attributes:
        steps: how many.
        wall: milliseconds from one step's begin to the next one's, the profiler's own cost included.
        parts: milliseconds by part; of the device, if ``on_device`` (then HOST is left 0: the profiled gap says nothing).
    """

    steps: int
    wall: float
    parts: dict[str, float]
    on_device: bool


def load(path: Path) -> list[dict]:
    """The events of a trace file."""
    with (gzip.open(path, "rt") if path.suffix == ".gz" else path.open()) as file:
        return json.load(file)["traceEvents"]


def attribute(events: Sequence[dict], batch: int) -> Split:
    """Attribute the decode steps of a full batch. Raises ValueError where a trace holds no two such steps in a row."""
    spans = [e for e in events if e.get("ph") == "X" and e["name"].startswith(PREFIX) and e.get("cat") != "gpu_user_annotation"]
    begins = sorted((float(e["ts"]), e["name"]) for e in spans if e["name"].startswith(PREFIX + STEP))
    wanted = f"{PREFIX}{STEP} decode {batch}"
    # The profiler starts inside one step and stops at the begin of another: a step is whole when the next one is there.
    steps = [(begin, end) for (begin, name), (end, after) in zip(begins, begins[1:]) if name == wanted == after]
    if not steps:
        raise ValueError(f"no two decode steps of {batch} requests in a row among {len(begins)} steps")
    line = _Timeline(spans)
    on_device = any(e.get("cat") in DEVICE_EVENTS for e in events)
    spent = dict.fromkeys(PARTS, 0.0)
    if on_device:
        _charge_device(events, steps, line, spent)
    else:
        for begin, end in steps:
            line.charge(begin, end, spent)
    wall = sum(end - begin for begin, end in steps) / len(steps) / 1e3
    return Split(len(steps), wall, {part: spent[part] / len(steps) / 1e3 for part in PARTS}, on_device)


def on_wall(split: Split, wall: float) -> dict[str, float]:
    """The parts of a step that takes ``wall`` milliseconds without a profiler; they add up to it.

    Device: kernels last as long with a profiler as without, and what they leave of the wall time is the host gap. CPU:
    the profiler slows every part, so only the shares are kept, those of parts with many small ops too high.
    """
    busy = sum(split.parts.values())
    if split.on_device and busy <= wall:
        return {**split.parts, HOST: wall - busy}
    return {part: ms * wall / busy for part, ms in split.parts.items()}


class _Timeline:
    """Which part the host was at, from nested ranges of one thread; HOST outside all of them."""

    def __init__(self, spans: Sequence[dict]):
        edges = []
        for span in spans:
            name = span["name"].removeprefix(PREFIX)
            if not name.startswith(STEP):
                begin = float(span["ts"])
                # At equal times a range that ends comes before one that begins, and the longer of two that begin first.
                edges += [(begin, 1, -float(span["dur"]), name), (begin + float(span["dur"]), 0, 0.0, name)]
        self.times, self.parts, stack = [float("-inf")], [HOST], [HOST]
        for time, opens, _, name in sorted(edges):
            if opens:
                stack.append(name)
            else:
                stack.reverse()
                stack.remove(name)
                stack.reverse()
            self.times.append(time)
            self.parts.append(stack[-1])

    def at(self, time: float) -> str:
        return self.parts[bisect_right(self.times, time) - 1]

    def charge(self, begin: float, end: float, spent: dict[str, float]) -> None:
        """Add the microseconds between begin and end to their parts."""
        i = bisect_right(self.times, begin) - 1
        while begin < end:
            until = min(self.times[i + 1], end) if i + 1 < len(self.times) else end
            spent[self.parts[i]] += until - begin
            begin, i = until, i + 1


def _charge_device(events: Sequence[dict], steps: list[tuple[float, float]], line: _Timeline, spent: dict[str, float]) -> None:
    launches = {e["args"]["correlation"]: e for e in events if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {})}
    begins = [begin for begin, _ in steps]
    ran = []
    for event in events:
        if event.get("cat") not in DEVICE_EVENTS:
            continue
        launch = launches.get(event.get("args", {}).get("correlation"))
        if launch is None:
            continue
        at = float(launch["ts"])
        i = bisect_right(begins, at) - 1
        if i >= 0 and at < steps[i][1]:
            ran.append((float(event["ts"]), float(event["dur"]), event["name"], launch))
    ran.sort(key=lambda found: found[0])
    graphs: dict[int, list[int]] = {}
    parts = []
    for index, (_, _, name, launch) in enumerate(ran):
        if "GraphLaunch" in launch["name"]:
            part = _by_name(name)
            if part == GEMM:
                graphs.setdefault(launch["args"]["correlation"], []).append(index)
        else:
            part = line.at(float(launch["ts"]))
        parts.append(part)
    for products in graphs.values():
        parts[products[-1]] = LM_HEAD
    free = float("-inf")
    for (begin, duration, _, _), part in zip(ran, parts):
        # What the scheduler itself launches around the worker is set-up: HOST is the idle time.
        spent[SETUP if part == HOST else part] += max(0.0, begin + duration - max(begin, free))
        free = max(free, begin + duration)


def _by_name(name: str) -> str:
    if _ATTENTION_NAME.search(name):
        return ATTENTION
    return GEMM if _GEMM_NAME.search(name) else MODEL
