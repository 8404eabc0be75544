"""Results as one Markdown page."""

from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.simulate import fit, roofline
from benchmarks.simulate.devices import DEVICES
from benchmarks.simulate.predict import BASE, CONTROLLER, FIXED, SCENARIOS, Predicted, pick
from benchmarks.simulate.published import AR, covered, load
from benchmarks.simulate.results import Results
from benchmarks.simulate.validate import Checked

NOT_SLOWER = 0.97
"""The target for the controller's lowest ratio."""


def page(found: Results) -> str:
    return "\n".join([
        "# Simulated speed-up over AR",
        "",
        "A model, not a measurement; what it assumes: [docs/simulation.md](../../../docs/simulation.md).",
        "",
        f"Command: `{found.command}`",
        "",
        "## Fit and leave-one-out error",
        "",
        *_fit(found),
        "",
        "## Lowest ratio of the controller over AR",
        "",
        *_worst(found),
        "",
        "## Controller over AR",
        "",
        *_ratios(found.predicted, CONTROLLER, 0, "cold rounds"),
        "",
        *_ratios(found.predicted, CONTROLLER, 1, "salvage"),
        "",
        "## Fixed strides over AR",
        "",
        *(line for n in FIXED for line in (*_ratios(found.predicted, f"N={n}", 0, "cold rounds"), "")),
        "## Check on a machine where both ends are measured",
        "",
        *_checked(found),
        "",
    ])  # fmt: skip


def verdict(found: Results) -> list[str]:
    """The sentences that decide what the model may be used for, and whether the target is met."""
    ar, ratio = fit.errors(found.left_out)
    usable = max(ar.mean, ratio.mean) <= fit.LIMIT
    beyond = [x for x in found.left_out if abs(x.error) > fit.LIMIT]
    lowest = min(pick(found.predicted, CONTROLLER), key=lambda r: r.steady_ratio)
    return [
        f"leave-one-out error: AR's tokens per second {ar.mean:.1%} on average, {ar.worst.error:+.1%} at worst; ratio to AR {ratio.mean:.1%} on average, {ratio.worst.error:+.1%} at worst",
        f"{len(beyond)} of {len(found.left_out)} points are off by more than {fit.LIMIT:.0%}" + (": " + "; ".join(f"{_name(x)} {x.error:+.0%}" for x in beyond) if beyond else ""),
        f"on average within {fit.LIMIT:.0%}: {'figures may be quoted as predictions, with this error' if usable else 'NO: THE MODEL IS NOT USED FOR CLAIMS'}",
        f"lowest ratio of the controller over AR, {BASE.name}: {lowest.steady_ratio:.3f} ({lowest.setup}, C = {lowest.clients}); target {NOT_SLOWER}: {'met' if lowest.steady_ratio >= NOT_SLOWER else 'NOT met'}",
    ]


def _name(x: fit.LeftOut) -> str:
    p = x.point
    return f"{p.series}{f' N={p.stride}' if p.series != AR else ''} TP{p.tp} C={p.clients} ({p.source})"


def _fit(found: Results) -> list[str]:
    o = found.overheads
    sentences = verdict(found)
    lines = [f"- {s}" for s in sentences[:3]]
    lines += [
        f"- fitted on {len(covered(load()))} points: {o.context:.2f} thousand tokens of context, host {1e3 * o.host:.2f} ms a step, ISD {1e3 * o.isd:.2f} ms more and {1e6 * o.isd_request:.0f} µs for each running request",
        f"- assumed: {roofline.BANDWIDTH_SHARE:.0%} of the data sheet's bandwidth, {roofline.FLOPS_SHARE:.0%} of its FLOPs, {1e6 * roofline.ALL_REDUCE:.0f} µs an all-reduce, the adapter's {roofline.LORA} claimed by its authors",
        "- devices: " + "; ".join(f"{d.name} {d.bandwidth / 1e12:g} TB/s, {d.flops['bf16'] / 1e12:g} / {d.flops['fp8'] / 1e12:g} TFLOP/s in bf16 / FP8, {d.memory / 1e9:g} GB ({d.source})" for d in DEVICES.values()),
        f"- {_tp4(found.predicted)}",
        "",
        "A point is predicted by a fit without all points of its setting (TP and C). AR: tokens per second; else the ratio to AR.",
        "",
        *_table(["point", "published", "predicted without it", "error"], ([_name(x), f"{x.published:.4g}", f"{x.predicted:.4g}", f"{x.error:+.1%}"] for x in found.left_out)),
    ]
    return lines


def _tp4(rows: Sequence[Predicted]) -> str:
    """A published sentence that is no point of the fit."""
    slower = [r.clients for r in pick(rows, "N=3") if r.setup == "8B bf16 H100 TP4" and r.steady_ratio < 1]
    return f"published: at TP4 and N = 3 AR wins from C = 8 on; simulated: {f'from C = {min(slower)} on' if slower else 'at no C'}"


def _worst(found: Results) -> list[str]:
    clients = [r.clients for r in found.predicted]
    lines = [
        f"Steady load, cold rounds, C = {min(clients)} to {max(clients)}, {len({r.setup for r in found.predicted})} set-ups. Cost of N = 1 over AR: {1e3 * found.single.seconds:.2f} ms a token, or {found.single.share:.1%} of",
        f"AR's speed ({found.single.source}). {'' if 'typed' in found.single.source else 'Measured on a CPU; on a GPU it has not been.'}",
        "",
    ]
    rows = []
    for scenario in SCENARIOS:
        mine = pick(found.predicted, CONTROLLER, scenario)
        low = min(mine, key=lambda r: r.steady_ratio)
        below = [r for r in mine if r.steady_ratio < NOT_SLOWER]
        rows.append([scenario.name, f"{low.steady_ratio:.3f}", f"{low.setup}, C = {low.clients}", low.used, f"{len(below)} of {len(mine)}", f"{min(r.total_ratio for r in mine):.3f}"])
    lines += _table(["assumption", "lowest", "where", "strides used there (share of rounds)", f"points below {NOT_SLOWER}", "lowest with ramp-down counted"], rows)
    single = {(r.setup, r.clients): r.steady_ratio for r in pick(found.predicted, "N=1")}
    below = [r for r in pick(found.predicted, CONTROLLER) if r.steady_ratio < NOT_SLOWER]
    if below:
        best = {(r.setup, r.clients): max(x.steady_ratio for n in FIXED for x in pick(found.predicted, f"N={n}") if (x.setup, x.clients) == (r.setup, r.clients)) for r in below}
        lines += ["", f"The points below {NOT_SLOWER} in the first line, beside forced N = 1 and the best fixed stride of {', '.join(map(str, FIXED))}:", ""]
        lines += _table(["set-up", "C", "controller", "N = 1", "best fixed", "strides used"],
                        ([r.setup, r.clients, f"{r.steady_ratio:.3f}", f"{single[r.setup, r.clients]:.3f}", f"{best[r.setup, r.clients]:.3f}", r.used] for r in below))  # fmt: skip
    return lines


def _ratios(rows: Sequence[Predicted], arm: str, salvage: int, title: str) -> list[str]:
    mine = pick(rows, arm, salvage=salvage)
    clients = sorted({r.clients for r in mine})
    by = {(r.setup, r.clients): r for r in mine}

    def cell(r: Predicted) -> str:
        return f"{r.steady_ratio:.2f}" + ("" if r.running == r.clients else f" ({r.running} run)")

    table = _table(["set-up", *(f"C = {c}" for c in clients)], ([s, *(cell(by[s, c]) for c in clients)] for s in dict.fromkeys(r.setup for r in mine)))
    return [f"{arm}, {title}:", "", *table]


def _checked(found: Results) -> list[str]:
    lines = [f"In: step times of `{found.step_time}`; of `{found.bench}` (a later folder replaces concurrencies of an earlier one) answer lengths, acceptance by position, prefill time of the stock arm. Out: ratios to stock.", ""]
    lines += _table(["arm", "C", "simulated", "measured (95 % interval)", "error", "inside", "tokens per round, simulated / measured"],
                    ([x.arm, x.concurrency, f"{x.simulated:.2f}", _interval(x), f"{x.error:+.0%}", "yes" if x.inside else "no", f"{x.simulated_per_round:.2f} / {x.measured_per_round:.2f}"] for x in found.checked))  # fmt: skip
    lines += ["", *(f"- {s}" for s in check_errors(found.checked))]
    return lines


def check_errors(checked: Sequence[Checked]) -> list[str]:
    """Mean absolute error of each arm."""
    by_arm: dict[str, list[Checked]] = {}
    for x in checked:
        by_arm.setdefault(x.arm, []).append(x)
    return [
        f"{arm}: ratio off by {np.mean([abs(x.error) for x in mine]):.1%} on average, {max(mine, key=lambda x: abs(x.error)).error:+.0%} at worst; {sum(x.inside for x in mine)} of {len(mine)} inside the measured interval"
        for arm, mine in by_arm.items()
    ]


def _interval(x: Checked) -> str:
    return f"{x.measured:.2f}" + ("" if x.low is None else f" ({x.low:.2f} to {x.high:.2f})")


def _table(head: Sequence, rows: Iterable[Sequence]) -> list[str]:
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows)]
