"""The comparison as Markdown and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from idlm_sglang.quality import published
from idlm_sglang.quality.options import Plan
from idlm_sglang.quality.scores import ALL, Comparison, Row
from idlm_sglang.quality.statistics import CONFIDENCE, UNDECIDED, Interval, Verdict


def markdown(plan: Plan, fingerprint: dict[str, Any], rows: Sequence[Row], pooled: Sequence[Comparison], not_run: dict[str, str]) -> str:
    """The whole report."""
    parts = [_arms(fingerprint)]
    if rows:
        parts += [_scores(plan, rows), _comparisons(plan, rows, pooled)]
    if not_run:
        parts.append("## Not run\n\n" + _table(("benchmark", "why"), [[name, why] for name, why in not_run.items()]))
    if plan.published:
        parts.append(
            "Published scores are the authors' own, from their prompts and their engine; they have no interval and are no part of a verdict. "
            "`within` means: inside this arm's interval."
        )
    parts.append(
        f"Intervals: {CONFIDENCE:.0%}. Parity: the whole interval of the paired difference lies within +-{100 * plan.margin:g} points; "
        "worse and better allow for the number of lines. "
        "Cut off: answers that the limit of tokens ended; empty: answers with nothing behind the thinking, which score as wrong. "
        "Same text: answers that are identical, thinking included."
    )
    return "\n\n".join(parts) + "\n"


def document(plan: Plan, fingerprint: dict[str, Any], rows: Sequence[Row], pooled: Sequence[Comparison], not_run: dict[str, str]) -> dict[str, Any]:
    """The same as JSON; scores are shares, not percent."""
    made = []
    for each in rows:
        arms = {name: {key: value for key, value in asdict(arm).items() if key != "values"} for name, arm in each.arms.items()}
        entry = {"benchmark": each.name, "task": each.task, "metric": each.metric, "versions": each.versions, "higher_is_better": each.better_high}
        entry |= {"questions": len(each.keys), "arms": arms, "comparisons": [asdict(c) for c in each.comparisons]}
        if plan.published:
            entry["published"] = {column: published.figure(each.name, column) for column in published.COLUMNS}
        made.append(entry)
    return {"fingerprint": fingerprint, "benchmarks": made, "all": [asdict(c) for c in pooled], "not_run": not_run}


def write(out: Path, text: str, made: dict[str, Any], rows: Sequence[Row]) -> None:
    """report.md, report.json and questions.jsonl, one line per question with every arm's score."""
    (out / "report.md").write_text(text)
    (out / "report.json").write_text(json.dumps(made, indent=1, default=str) + "\n")
    with (out / "questions.jsonl").open("w") as lines:
        for each in rows:
            for i, (task, number, digest) in enumerate(each.keys):
                scores = {arm: found.values[i] for arm, found in each.arms.items()}
                lines.write(json.dumps({"benchmark": each.name, "task": task, "question": number, "hash": digest, "scores": scores}) + "\n")


def _arms(fingerprint: dict[str, Any]) -> str:
    rows = []
    for name, arm in fingerprint["arms"].items():
        info = arm["info"]
        how = info.get("speculative_algorithm") or info.get("dllm_algorithm") or ("AR" if info else "unknown")
        if info.get("speculative_num_draft_tokens"):
            how += f", {info['speculative_num_draft_tokens']} rows"
        extra = f"`{json.dumps(arm['extra'])}`" if arm["extra"] else ""
        rows.append([name + (" (reference)" if not rows else ""), arm["url"], info.get("model_path") or arm["model"], how, info.get("dtype", ""), extra])
    sampling = ", ".join(f"{key} {value:g}" for key, value in fingerprint["sampling"].items()) or "as the tasks say"
    head = f"# idlm eval: {fingerprint['what']}\n\nSampling: {sampling}; thinking: {fingerprint['thinking']}; seed {fingerprint['seed']}; "
    head += f"{fingerprint['repeats']} answer{'s' if fingerprint['repeats'] > 1 else ''} per question"
    head += f"; the first {fingerprint['limit']} questions of each task" if fingerprint["limit"] else ""
    return head + ".\n\n" + _table(("arm", "endpoint", "model", "decoding", "dtype", "added to requests"), rows)


def _scores(plan: Plan, rows: Sequence[Row]) -> str:
    names = list(rows[0].arms)
    heads = ["benchmark", "metric", "questions", *names, *(f"{name}: cut off, empty" for name in names)]
    if plan.published:
        heads += [f"published {plan.published}", *(f"{name} to it" for name in names)]
    body = []
    for each in rows:
        arms = each.arms.values()
        cells = [each.name, each.metric, str(len(each.keys)), *(_interval(arm.mean) for arm in arms), *(f"{arm.cut_off}, {arm.empty}" for arm in arms)]
        if plan.published:
            figure = published.figure(each.name, plan.published)
            cells += ["-" if figure is None else f"{figure:.1f}", *("-" if figure is None else _beside(arm.mean, figure) for arm in arms)]
        body.append(cells)
    return "## Scores, percent\n\n" + _table(heads, body)


def _comparisons(plan: Plan, rows: Sequence[Row], pooled: Sequence[Comparison]) -> str:
    reference = next(iter(rows[0].arms))
    heads = ("benchmark", "arm", f"arm minus {reference}, points", "arm higher", "arm lower", "same text", "verdict")
    body = [_line(each.name, c) for each in rows for c in each.comparisons]
    if len(rows) > 1:
        body += [_line(f"**{ALL}**", c) for c in pooled]
    return f"## Against {reference}, question by question\n\n" + _table(heads, body)


def _line(name: str, c: Comparison) -> list[str]:
    return [name, c.arm, _interval(c.difference, sign="+"), str(c.won), str(c.lost), f"{c.same_text}/{c.answers}", said(c.verdict)]


def said(verdict: Verdict) -> str:
    """A verdict in words."""
    if verdict.word != UNDECIDED:
        return verdict.word
    more = "no number of questions would do at this difference" if verdict.more is None else f"about {verdict.more} more questions needed"
    return f"undecided (interval too wide: {more})"


def _beside(mean: Interval, figure: float) -> str:
    if 100 * mean.high < figure:
        return "below"
    return "above" if 100 * mean.low > figure else "within"


def _interval(found: Interval, sign: str = "") -> str:
    return f"{100 * found.mean:{sign}.1f} [{100 * found.low:{sign}.1f}, {100 * found.high:{sign}.1f}]"


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    escaped = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in [heads, *body]]
    return "\n".join("| " + " | ".join(line) + " |" for line in [escaped[0], ["---"] * len(heads), *escaped[1:]])
