"""Tokens per second and waiting times of both servers, measured in turn on the same streamed requests."""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from idlm_sglang.parity.endpoint import Reply, Side, completion_tokens
from idlm_sglang.parity.findings import Finding, Table
from idlm_sglang.parity.options import Plan
from idlm_sglang.parity.prompts import Ask
from idlm_sglang.serving.replay import CHAT

MOST = 64  # requests of a round
_RESAMPLES = 2000
_AT_A_TIME = 1 << 20  # values of resamples in memory: the gaps of a file's answers are many


@dataclass
class Times:
    """One server's, all rounds together.

    Attributes:
        throughput: output tokens of a round per second of it, one for each round.
        first, latency: seconds to the first event with text and to the end, by round and request.
        gaps: seconds between events with text, of all answers.
        per_request: tokens of an answer over its latency.
    """

    throughput: list[float] = field(default_factory=list)
    first: list[list[float]] = field(default_factory=list)
    latency: list[list[float]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    per_request: list[float] = field(default_factory=list)


def compare(asks: Sequence[Ask], left: Side, right: Side, plan: Plan) -> Finding:
    """``plan.speed_rounds`` rounds on each server, never both at a time, in changing order, behind one that does not count."""
    if not plan.speed_rounds:
        return Finding("speed", None, "left out (--speed-rounds 0)")
    some = [ask for ask in asks if ask.path == CHAT and ask.body.get("n", 1) == 1][:MOST]
    if not some:
        wanted = None if plan.min_speed_ratio is None else False
        return Finding("speed", wanted, "no chat request of the file can be timed")
    sides = (left, right)
    times = {left.name: Times(), right.name: Times()}
    for number in range(-1, plan.speed_rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            _round(some, side, plan.concurrency, times[side.name] if number >= 0 else Times())
    return _finding(times[left.name], times[right.name], len(some), plan)


def _round(asks: Sequence[Ask], side: Side, clients: int, times: Times) -> None:
    def one(ask: Ask) -> tuple[Reply, int]:
        reply = side.ask(ask, ask.body | {"stream": True, "stream_options": {"include_usage": True}})
        return reply, completion_tokens(ask.path, reply.answer.tree) or 0

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        answered = [(reply, tokens) for reply, tokens in pool.map(one, asks) if reply.answer.status == 200]
    seconds = time.monotonic() - began
    if not sum(tokens for _, tokens in answered):
        raise side.failed("streams no answer with its number of tokens (usage)")
    times.throughput.append(sum(tokens for _, tokens in answered) / seconds)
    times.first.append([reply.arrivals[0] - reply.started if reply.arrivals else float("nan") for reply, _ in answered])
    times.latency.append([reply.ended - reply.started for reply, _ in answered])
    for reply, tokens in answered:
        times.gaps += np.diff(reply.arrivals).tolist()
        times.per_request.append(tokens / (reply.ended - reply.started))


def _finding(ours: Times, theirs: Times, requests: int, plan: Plan) -> Finding:
    from idlm_sglang.bench.summary import ratio

    found = ratio(theirs.throughput, ours.throughput)
    passed = None if plan.min_speed_ratio is None else found.mean >= plan.min_speed_ratio
    rows = [["tokens per second, all requests", *(f"{statistics.median(t.throughput):.1f}" for t in (ours, theirs)), "", "", "", "", str(found)]]
    waits = (
        ("to the first text, ms", ours.first, theirs.first),
        ("whole answer, ms", ours.latency, theirs.latency),
        ("between chunks, ms", ours.gaps, theirs.gaps),
    )
    for name, a, b in waits:
        paired = name != "between chunks, ms"
        x, y = (np.asarray(np.concatenate(t) if paired else t, float) for t in (a, b))
        rows.append([name, *_percentiles(x, y), _paired(x, y) if paired and len(x) == len(y) else _quotient(x, y)])
    line = f"{found} times the baseline's tokens per second ({plan.speed_rounds} rounds of {requests} requests, {plan.concurrency} at a time); "
    line += f"first text {rows[1][-1]} times, whole answer {rows[2][-1]} times its time"
    if plan.min_speed_ratio is not None:
        line += f"; wanted {plan.min_speed_ratio:g}"
    heads = ("", "baseline p50", "candidate p50", "baseline p90", "candidate p90", "baseline p99", "candidate p99", "candidate over baseline (95 %)")
    notes = [
        "Throughput: ratio of the rounds in pairs, geometric mean, Student's t on logarithms. Waiting times: median of the ratios of the same request in the "
        "same round (to the first text, whole answer), or ratio of the medians (between chunks), with a bootstrap's interval. A chunk holds several tokens where several "
        "are committed at once."
    ]
    return Finding("speed", passed, line, [Table("Speed and latency", heads, rows)], notes)


def _percentiles(x: np.ndarray, y: np.ndarray) -> list[str]:
    found = [[f"{1000 * v:.1f}" for v in np.nanpercentile(z, (50, 90, 99))] if len(z) else ["-"] * 3 for z in (x, y)]
    return [cell for pair in zip(*found) for cell in pair]


def _paired(x: np.ndarray, y: np.ndarray) -> str:
    ratios = (y / x)[np.isfinite(y / x)]
    return _with_interval((ratios,), np.median) if len(ratios) else "-"


def _quotient(x: np.ndarray, y: np.ndarray) -> str:
    if not len(x) or not len(y):
        return "-"
    return _with_interval((x, y), lambda a, b, axis=-1: np.median(b, axis=axis) / np.median(a, axis=axis))


def _with_interval(data: tuple[np.ndarray, ...], statistic) -> str:
    mean = float(statistic(*data, axis=-1))
    if min(map(len, data)) < 3:
        return f"{mean:.2f}"
    drawn = {"n_resamples": _RESAMPLES, "batch": max(_AT_A_TIME // max(map(len, data)), 1)}
    found = stats.bootstrap(data, statistic, **drawn, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return f"{mean:.2f} ({found.low:.2f} to {found.high:.2f})"
