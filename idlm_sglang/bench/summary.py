"""From raw results to figures: one cell per arm and load, and its ratio to the reference with a spread."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from scipy import stats

from idlm_sglang.bench import lengths
from idlm_sglang.bench.load import Point

CONFIDENCE = 0.95
NOT_SLOWER = 0.97  # below this ratio an arm counts as slower than the reference


@dataclass(frozen=True)
class Ratio:
    """Throughput of an arm over that of the reference, paired by repeat.

    The geometric mean of the repeats' ratios, and the ends of its 95 % interval (Student's t on their logarithms). None with one repeat.
    """

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.low is None else f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Cell:
    """One arm under one load, all repeats together.

    Attributes:
        throughput: output tokens of all requests per second, from the first request sent to the last answer's end; median of the repeats.
        steady: the same while at least 0.9 of the peak concurrency was there; NaN where that was less than half of the time, as it is at low concurrency.
        per_request: tokens of one answer over its whole latency, per second; median over requests.
        tpot, ttft, latency: seconds per token behind the first, to the first token, and of the whole answer: p50, p90, p99 over the requests of all repeats.
        decoding: tokens per forward, queries, acceptance; None where unknown.
        ratio: to the reference arm, None for itself.
        lengths: answers by the least length of their class (:mod:`~idlm_sglang.bench.lengths`).
        by_length: ratio to the reference arm by class, of tokens per second of an answer; empty for itself.
        same: answers equal to the reference's, of ``of`` answers in both.
        cut: share of the answers that ended at their longest length.
        requests: latencies of all requests in seconds, for a plot.
    """

    arm: str
    temperature: float
    concurrency: int
    repeats: int
    throughput: float
    steady: float
    per_request: float
    tpot: tuple[float, float, float]
    ttft: tuple[float, float, float]
    latency: tuple[float, float, float]
    decoding: dict[str, Any] | None
    ratio: Ratio | None
    lengths: dict[int, int]
    by_length: dict[int, Ratio]
    same: int
    of: int
    cut: float
    requests: np.ndarray


def throughput(result: dict[str, Any]) -> float:
    """Output tokens per second of one point."""
    told = result["requests"]
    end = max(start + latency for start, latency in zip(told["start"], told["latency"]))
    return sum(told["tokens"]) / (end - min(told["start"]))


def ratio(ours: list[float], theirs: list[float]) -> Ratio:
    """Of two lists of throughputs, paired by repeat."""
    logs = np.log(np.asarray(ours) / np.asarray(theirs))
    mean = float(logs.mean())
    if len(logs) < 2:
        return Ratio(math.exp(mean), None, None)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def cells(results: dict[Point, dict[str, Any]], arms: list[str]) -> list[Cell]:
    """Every arm under every load that all its repeats were measured for, in order of temperature, concurrency and arm; the first arm is the reference."""
    loads = sorted({(p.temperature, p.concurrency) for p in results})
    found = []
    for temperature, concurrency in loads:
        by_arm = {arm: {p.repeat: r for p, r in results.items() if (p.arm, p.temperature, p.concurrency) == (arm, temperature, concurrency)} for arm in arms}
        for arm in arms:
            if by_arm[arm]:
                found.append(_cell(arm, temperature, concurrency, by_arm[arm], by_arm[arms[0]], arm == arms[0]))
    return found


def _cell(arm: str, temperature: float, concurrency: int, ours: dict[int, dict], reference: dict[int, dict], is_reference: bool) -> Cell:
    told = [r["requests"] for r in ours.values()]
    latency, ttft, tokens = (np.concatenate([np.asarray(t[key], float) for t in told]) for key in ("latency", "ttft", "tokens"))
    # An answer without text has no time to its first.
    ttft = np.where(ttft > 0, ttft, math.nan)
    several = (tokens > 1) & ~np.isnan(ttft)
    tpot = (latency[several] - ttft[several]) / (tokens[several] - 1)
    shared = sorted(ours.keys() & reference.keys())
    pairs = [pair for r in shared for pair in zip(ours[r]["requests"]["answer"], reference[r]["requests"]["answer"], strict=True)]
    return Cell(
        arm,
        temperature,
        concurrency,
        len(ours),
        float(np.median([throughput(r) for r in ours.values()])),
        float(np.median([r["steady"]["output_throughput"] for r in ours.values()])) if all(map(_mostly_steady, ours.values())) else math.nan,
        float(np.median(tokens / latency)),
        _percentiles(tpot),
        _percentiles(ttft[~np.isnan(ttft)]),
        _percentiles(latency),
        _together([r["decoding"] for r in ours.values()]),
        None if is_reference or not shared else ratio([throughput(ours[r]) for r in shared], [throughput(reference[r]) for r in shared]),
        lengths.counts(list(ours.values())),
        {} if is_reference else lengths.compare([ours[r] for r in shared], [reference[r] for r in shared], ratio),
        sum(a == b for a, b in pairs),
        len(pairs),
        sum(r["finished"].get("length", 0) for r in ours.values()) / len(tokens),
        np.sort(latency),
    )


def _mostly_steady(result: dict[str, Any]) -> bool:
    return result["steady"]["seconds"] > 0.5 * result["serving"]["duration"]


def _percentiles(values: np.ndarray) -> tuple[float, float, float]:
    return tuple(float(v) for v in np.percentile(values, (50, 90, 99))) if len(values) else (math.nan,) * 3


def _together(parts: list[dict | None]) -> dict | None:
    """Counts by position summed over the repeats, other figures averaged; None as soon as one is unknown."""
    if any(part is None for part in parts):
        return None
    means = {key: _mean(part[key] for part in parts) for key in ("tokens_per_forward", "queries", "efficiency", "introspective_acceptance", "cold")}
    return means | {key: [sum(column) for column in zip_longest(*(part[key] for part in parts), fillvalue=0)] for key in ("accepted", "proposed")}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def findings(found: list[Cell], reference: str) -> list[str]:
    """One sentence per arm and temperature: where it is faster, slower, or cannot be told apart from the reference."""
    lines = []
    for c in found:
        if c.ratio and c.temperature == 0 and c.same < c.of:
            lines.append(f"{c.arm}: {c.of - c.same} of {c.of} greedy answers at C = {c.concurrency} differ from those of {reference} (bf16 near-ties, or another model)")
    for arm, temperature in dict.fromkeys((c.arm, c.temperature) for c in found if c.ratio):
        mine = [c for c in found if (c.arm, c.temperature) == (arm, temperature) and c.ratio]
        faster = [c for c in mine if c.ratio.low is not None and c.ratio.low > 1]
        slower = [c for c in mine if c.ratio.high is not None and c.ratio.high < 1]
        open_ = [c for c in mine if c not in faster and c not in slower]
        parts = [f"faster at C = {_at(faster)}"] if faster else []
        parts += [f"SLOWER at C = {_at(slower)}"] if slower else []
        parts += [f"not told apart at C = {_at(open_)}"] if open_ and mine[0].repeats > 1 else []
        parts += [f"one repeat, no interval, at C = {_at(open_)}"] if open_ and mine[0].repeats == 1 else []
        low = min(mine, key=lambda c: c.ratio.mean)
        below = "" if low.ratio.mean >= NOT_SLOWER else f", below {NOT_SLOWER}"
        lines.append(f"{arm} against {reference}, T = {temperature:g}: {'; '.join(parts)}; lowest ratio {low.ratio.mean:.2f} at C = {low.concurrency}{below}")
    return lines


def _at(some: list[Cell]) -> str:
    return ", ".join(str(c.concurrency) for c in some)
