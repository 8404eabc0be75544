"""The comparison as Markdown, as one HTML page without outside parts, and as JSON."""

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from idlm_sglang.parity.findings import Finding, Table
from idlm_sglang.parity.options import Plan

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --ok: #187a3c; --bad: #b3261e; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-size: 13px; display: block; overflow-x: auto; }
td, th { border: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top; }
.ok { color: var(--ok); font-weight: 600; } .FAIL { color: var(--bad); font-weight: 600; }
.verdict { font-size: 1.2rem; padding: .6rem 1rem; border-left: 6px solid; } .notes { opacity: .75; }
"""


def title(plan: Plan) -> str:
    return f"idlm parity: {plan.candidate} against {plan.baseline}"


def verdict(findings: Sequence[Finding]) -> str:
    """The closing line."""
    failed = [finding.name for finding in findings if finding.passed is False]
    return f"not at parity: {', '.join(failed)}" if failed else "parity"


def arms(served: dict[str, Any]) -> Table:
    """What each server said of itself."""
    keys = sorted({key for each in served.values() for key in each})
    return Table("Servers", ("", *served), [[key, *(each.get(key, "") for each in served.values())] for key in keys])


def markdown(plan: Plan, head: str, servers: Table, findings: Sequence[Finding]) -> str:
    parts = [f"# {title(plan)}", f"**{verdict(findings)}**", head]
    parts.append(_table(Table("", ("part", "", "figures"), [[f.name, f.word, f.line] for f in findings])))
    for finding in findings:
        for table in finding.tables:
            parts += [f"## {finding.name}: {table.title}", _table(table)]
        parts += finding.notes
    parts += [f"## {servers.title}", _table(servers)]
    return "\n\n".join(parts) + "\n"


def page(plan: Plan, head: str, servers: Table, findings: Sequence[Finding]) -> str:
    said = verdict(findings)
    word = "FAIL" if any(f.passed is False for f in findings) else "ok"
    parts = [f"<h1>{_e(title(plan))}</h1>", f'<p class="verdict {word}">{_e(said)}</p>', f"<p>{_e(head)}</p>"]
    body = "".join(f'<tr><td>{_e(f.name)}</td><td class="{f.word}">{_e(f.word)}</td><td>{_e(f.line)}</td></tr>' for f in findings)
    parts.append(f"<table><tr><th>part</th><th></th><th>figures</th></tr>{body}</table>")
    for finding in findings:
        for table in finding.tables:
            parts += [f"<h2>{_e(finding.name)}: {_e(table.title)}</h2>", _html(table)]
        parts += [f'<p class="notes">{_e(note)}</p>' for note in finding.notes]
    parts += [f"<h2>{_e(servers.title)}</h2>", _html(servers)]
    start = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_e(title(plan))}</title><style>{_STYLE}</style></head><body>'
    return start + "\n".join(parts) + "</body></html>\n"


def document(plan: Plan, head: str, served: dict[str, Any], findings: Sequence[Finding]) -> dict[str, Any]:
    """The same as JSON; keys are left out."""
    asked = {key: value for key, value in asdict(plan).items() if "api_key" not in key}
    return {"verdict": verdict(findings), "parity": all(f.passed is not False for f in findings), "asked": asked, "about": head, "servers": served} | {
        "findings": [asdict(finding) for finding in findings]
    }


def write(out: Path, plan: Plan, head: str, served: dict[str, Any], findings: Sequence[Finding]) -> None:
    """report.html, report.md and report.json."""
    servers = arms(served)
    (out / "report.html").write_text(page(plan, head, servers, findings))
    (out / "report.md").write_text(markdown(plan, head, servers, findings))
    (out / "report.json").write_text(json.dumps(document(plan, head, served, findings), indent=1, default=str) + "\n")


def _e(text: object) -> str:
    return html.escape(str(text))


def _html(table: Table) -> str:
    rows = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<table><tr>{''.join(f'<th>{_e(head)}</th>' for head in table.heads)}</tr>{rows}</table>"


def _table(table: Table) -> str:
    lines = [table.heads, ["---"] * len(table.heads), *table.rows]
    return "\n".join("| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in line) + " |" for line in lines)
