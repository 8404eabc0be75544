"""The Markdown report of a comparison."""

import math
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from idlm_sglang.bench.summary import Cell, findings

_MS = 1000.0

READING = """\
Ratio: total throughput over that of `{reference}`, paired by repeat: geometric mean and 95 % interval (Student's t over the
repeats). An interval around 1 means: not told apart. Same answers: byte-equal to the reference's. TPOT: seconds behind the
first token over the tokens behind it, not the gap between chunks. TPF: tokens per request and decode forward; queries: rows of
a request in one forward; efficiency: TPF²/queries. Acceptance by position: of the drafts verified at this point alone."""


def report(cells: Sequence[Cell], plan: dict[str, Any], fingerprints: Sequence[dict[str, Any]], plots: Sequence[str]) -> str:
    """What was measured, what it says, the tables and the plots."""
    reference = plan["arms"][0]["name"]
    parts = ["# AR against ISD: " + plan["checkpoint"]["name"], _setup(plan, fingerprints)]
    parts.append("\n".join(f"- {line}" for line in findings(list(cells), reference)))
    for temperature in dict.fromkeys(c.temperature for c in cells):
        some = [c for c in cells if c.temperature == temperature]
        parts += [f"## T = {temperature:g}", _throughput(some), _latency(some), _decoding(some)]
    parts.append(READING.format(reference=reference))
    parts += [f"![{name}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def _setup(plan: dict[str, Any], fingerprints: Sequence[dict[str, Any]]) -> str:
    last = fingerprints[-1]
    made = last["machine"]
    lines = [f"Command: `{fingerprints[-1]['command']}`", ""]
    lines.append(f"Device: {made['device']} ({made['processor']}); checkpoint {plan['checkpoint']['hash'] or 'not at hand to be hashed'}.")
    versions = ", ".join(f"{name} {found}" for name, found in made["versions"].items() if found)
    lines.append(f"Versions: {versions}{'; commit ' + made['commit'] if made['commit'] else ''}.")
    body = ", ".join(f"{key} {value}" for key, value in plan["body"].items())
    lines.append(f"Load: {plan['requests']} requests a point at least {plan['per_client']} per client, {plan['repeats']} repeats, arms in turn; {plan['source']}; {body}.")
    if len(fingerprints) > 1:
        lines.append(f"Measured in {len(fingerprints)} runs of the command.")
    return "\n".join(lines)


def _throughput(cells: list[Cell]) -> str:
    head = ["C", "arm", "total tok/s", "steady tok/s", "per request tok/s", "ratio", "same answers"]
    rows = [
        [c.concurrency, c.arm, f"{c.throughput:.0f}", f"{c.steady:.0f}", f"{c.per_request:.0f}", str(c.ratio or "1"), f"{c.same} of {c.of}" if c.ratio else ""]
        for c in cells
    ]
    return _table(head, rows)


def _latency(cells: list[Cell]) -> str:
    head = ["C", "arm", "TPOT p50 / p90 / p99 (ms)", "TTFT p50 / p90 / p99 (ms)", "answer p50 / p90 / p99 (ms)"]
    return _table(head, [[c.concurrency, c.arm, _ms(c.tpot, 2), _ms(c.ttft, 0), _ms(c.latency, 0)] for c in cells])


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


def _table(head: list[str], rows: list[list]) -> str:
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def _ms(seconds: tuple[float, float, float], digits: int) -> str:
    return " / ".join("–" if math.isnan(s) else f"{s * _MS:.{digits}f}" for s in seconds)
