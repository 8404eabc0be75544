"""The Markdown report of a comparison."""

import math
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from idlm_sglang.bench import lengths
from idlm_sglang.bench.arms import STOCK, URL
from idlm_sglang.bench.one_batch import BatchCell
from idlm_sglang.bench.options import masked
from idlm_sglang.bench.summary import Cell, findings

_MS = 1000.0

READING = """\
Ratio: total throughput over that of `{reference}`, paired by repeat: geometric mean and 95 % interval (Student's t over the
repeats), each interval for itself. One that holds 1 means: not told apart; of 20 comparisons of equal arms one misses it.
Steady: while at least 0.9 of the load was there, where that was most of the time. Same answers: byte-equal to the
reference's, where both were given the same seeds and know them. TPOT: seconds behind the first token over the tokens
behind it, not the gap between chunks. By length: tokens per second of an answer over the reference's, of answers of that length.
TPF: tokens per request and decode forward; queries: rows of a request in one forward; efficiency: TPF²/queries. Acceptance
by position: of the drafts verified at this point alone."""


READING_BATCHES = """\
One batch: requests that start together, and nothing behind them, batch after batch. Decode: tokens of all requests behind the last
first token, over the time from there to the last end. Steady: from there to the first end, median of the batches; full: its share of that time. Ratio: of decode, as above.
In a burst: batches at more than 3 times the median rate, whose first tokens waited for a busy
machine; they are not in decode tok/s. Where there are many, measure again."""


def title(plan: dict[str, Any], fingerprints: Sequence[dict[str, Any]]) -> str:
    """Of the plots: checkpoint and device."""
    return f"{plan['checkpoint']['name']}, {_device(plan, fingerprints)}"


def report(cells: Sequence[Cell], plan: dict[str, Any], fingerprints: Sequence[dict[str, Any]], plots: Sequence[str], batches: Sequence[BatchCell] = ()) -> str:
    """What was measured, what it says, the tables and the plots."""
    reference = plan["arms"][0]["name"]
    parts = [f"# {', '.join(arm['name'] for arm in plan['arms'])}: {plan['checkpoint']['name']}", _setup(cells, plan, fingerprints), _arms(plan, fingerprints)]
    parts.append("\n".join(f"- {line}" for line in findings(list(cells), reference)))
    # Stock SGLang knows no seeds.
    unseeded = plan["arms"][0]["kind"] == STOCK
    for temperature in dict.fromkeys(c.temperature for c in cells):
        some = [c for c in cells if c.temperature == temperature]
        parts += [f"## T = {temperature:g}", _throughput(some, unseeded and temperature > 0), _latency(some), _by_length(some), _decoding(some)]
    parts.append(READING.format(reference=reference))
    if batches:
        parts += ["## One batch", _one_batch(batches), READING_BATCHES]
    parts += [f"![{name}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def _device(plan: dict[str, Any], fingerprints: Sequence[dict[str, Any]]) -> str:
    ours = any(arm["kind"] != URL for arm in plan["arms"])
    return ("" if ours else "servers elsewhere, client on ") + fingerprints[-1]["machine"]["device"]


def _setup(cells: Sequence[Cell], plan: dict[str, Any], fingerprints: Sequence[dict[str, Any]]) -> str:
    made = fingerprints[-1]["machine"]
    lines = [f"Command: `{command}`  " for command in dict.fromkeys(f["command"] for f in fingerprints)]
    lines.append(f"Device: {_device(plan, fingerprints)} ({made['processor']}); checkpoint {plan['checkpoint']['hash'] or 'not at hand to be hashed'}.")
    versions = ", ".join(f"{name} {found}" for name, found in made["versions"].items() if found)
    commits = ", ".join(dict.fromkeys(f["machine"]["commit"] for f in fingerprints if f["machine"]["commit"]))
    lines.append(f"Versions: {versions}{'; commit ' + commits if commits else ''}.")
    fields = {**plan["body"], **{f"{key} at T > 0": value for key, value in plan["sampling"].items()}, "seed": plan["seed"]}
    repeats = "/".join(str(r) for r in sorted({c.repeats for c in cells}))
    lines.append(
        f"Load: at least {plan['requests']} requests a point and {plan['per_client']} per client, {repeats} repeats, arms in turn; {plan['source']}; "
        f"{', '.join(f'{key} {value}' for key, value in fields.items())}; answers cut at their longest length: {max(c.cut for c in cells):.0%} at most."
    )
    return "\n".join(lines)


def _arms(plan: dict[str, Any], fingerprints: Sequence[dict[str, Any]]) -> str:
    """One line an arm: what its server says of itself."""
    head = ["arm", "is", "attention", "dtype", "overlap", "KV tokens", "at a time", "flags"]
    rows = []
    for arm in plan["arms"]:
        found = next((f["server"] for f in reversed(fingerprints) if f["arm"] == arm["name"]), {})
        flags = found.get("flags", {})
        stride = found.get("stride")
        what = f"ISD, stride {stride}" if stride else flags.get("speculative_algorithm") or ("SGLang without the plugin" if arm["kind"] == STOCK else "one token per forward")
        overlap = {True: "off", False: "on"}.get(flags.get("disable_overlap_schedule"), "")
        own = " ".join(masked([*arm["flags"], *plan["server_flags"]])) or arm["url"] or ""
        rows.append([arm["name"], what, flags.get("attention_backend", ""), flags.get("dtype", ""), overlap, found.get("kv_tokens") or "", found.get("running_limit", ""), own])
    return _table(head, rows)


def _throughput(cells: list[Cell], unseeded: bool) -> str:
    head = ["C", "arm", "total tok/s", "steady tok/s", "per request tok/s", "ratio", "same answers"]
    rows = [
        [c.concurrency, c.arm, f"{c.throughput:.0f}", _rate(c.steady), _rate(c.per_request), str(c.ratio or "1"), _same(c, unseeded)]
        for c in cells
    ]
    return _table(head, rows)


def _rate(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0f}"


def _same(c: Cell, unseeded: bool) -> str:
    if c.ratio is None:
        return ""
    return "–" if unseeded else f"{c.same} of {c.of}"


def _latency(cells: list[Cell]) -> str:
    head = ["C", "arm", "TPOT p50 / p90 / p99 (ms)", "TTFT p50 / p90 / p99 (ms)", "answer p50 / p90 / p99 (ms)"]
    return _table(head, [[c.concurrency, c.arm, _ms(c.tpot, 2), _ms(c.ttft, 0), _ms(c.latency, 0)] for c in cells])


def _by_length(cells: list[Cell]) -> str:
    edges = sorted({edge for c in cells for edge in c.lengths})
    rows = []
    for c in cells:
        shown = [f"{c.lengths.get(edge, 0)} answers" if c.ratio is None else str(c.by_length.get(edge, "–")) for edge in edges]
        rows.append([c.concurrency, c.arm, *shown])
    return _table(["C", "arm", *map(lengths.name, edges)], rows)


def _decoding(cells: list[Cell]) -> str:
    head = ["C", "arm", "TPF", "queries", "efficiency", "cold", "introspective acceptance", "acceptance by position"]
    rows = []
    for c in cells:
        d = c.decoding
        if d is None:
            rows.append([c.concurrency, c.arm, "unknown", *[""] * 5])
            continue
        positions = " ".join(f"{a / p:.2f}" for a, p in zip(d["accepted"], d["proposed"]) if p)
        told = "" if d["introspective_acceptance"] is None else f"{d['introspective_acceptance']:.3f}"
        drafts = d["queries"] > 1
        rows.append([c.concurrency, c.arm, f"{d['tokens_per_forward']:.2f}", f"{d['queries']:.0f}", f"{d['efficiency']:.2f}", f"{d['cold']:.0%}" if drafts else "", told, positions])
    return _table(head, rows)


def _one_batch(cells: Sequence[BatchCell]) -> str:
    head = ["T", "C", "arm", "decode tok/s", "steady tok/s", "full", "last first token (ms)", "TPF", "ratio", "batches", "in a burst"]
    rows = []
    for c in cells:
        tpf = "unknown" if c.tokens_per_forward is None else f"{c.tokens_per_forward:.2f}"
        figures = [f"{c.throughput:.0f}", _rate(c.steady), f"{c.full:.0%}", f"{c.last_first * _MS:.0f}", tpf, str(c.ratio or "1"), c.batches, c.bursts]
        rows.append([f"{c.temperature:g}", c.concurrency, c.arm, *figures])
    return _table(head, rows)


def _table(head: list[str], rows: list[list]) -> str:
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def _ms(seconds: tuple[float, float, float], digits: int) -> str:
    return " / ".join("–" if math.isnan(s) else f"{s * _MS:.{digits}f}" for s in seconds)
