"""Bad requests: both servers refuse the same ones, with the same status and the same kind of error."""

from typing import Any

from idlm_sglang.parity.compare import fields
from idlm_sglang.parity.endpoint import Side
from idlm_sglang.parity.findings import Finding, Table
from idlm_sglang.serving.replay import CHAT, COMPLETIONS

_HELLO = [{"role": "user", "content": "Hello"}]
# What stands in an error beside its words, which may name a server's own limits.
_SAME = ("object", "type", "code", "param")


def _cases(model: str) -> dict[str, tuple[str, Any]]:
    chat = {"model": model, "messages": _HELLO, "max_tokens": 4}
    return {
        "no messages": (CHAT, {"model": model}),
        "messages of a wrong type": (CHAT, {**chat, "messages": "Hello"}),
        "an unknown role": (CHAT, {**chat, "messages": [{"role": 7, "content": "Hello"}]}),
        "temperature -1": (CHAT, {**chat, "temperature": -1}),
        "top_p 2": (CHAT, {**chat, "top_p": 2}),
        "max_tokens -1": (CHAT, {**chat, "max_tokens": -1}),
        "n of a wrong type": (CHAT, {**chat, "n": "two"}),
        "seed beyond 64 bits": (CHAT, {**chat, "seed": 2**70}),
        "a tool that is not there": (CHAT, {**chat, "tool_choice": {"type": "function", "function": {"name": "none"}}}),
        "a schema without a schema": (CHAT, {**chat, "response_format": {"type": "json_schema"}}),
        "top_p 2, streamed": (CHAT, {**chat, "top_p": 2, "stream": True}),
        "no prompt": (COMPLETIONS, {"model": model}),
        "frequency_penalty 9": (COMPLETIONS, {"model": model, "prompt": "Hello", "frequency_penalty": 9}),
        "no JSON": (CHAT, b'{"model": '),
        "not UTF-8": (CHAT, b'{"model": "\xff\xfe"}'),
    }


def compare(left: Side, right: Side, key_given: bool) -> Finding:
    """Status, fields and kind of every error; with a key, also what a request without it gets."""
    rows = []
    pairs = [(name, [side.post(*_cases(side.served.model)[name]) for side in (left, right)]) for name in _cases("")]
    if key_given:
        pairs.append(("no API key", [side.post(CHAT, {"model": side.served.model, "messages": _HELLO}, headers={}) for side in (left, right)]))
    for name, (ours, theirs) in pairs:
        a, b = ours.answer, theirs.answer
        found = []
        if a.status != b.status:
            found.append(f"status {a.status} against {b.status}")
        elif a.status != 200:
            found += [f"field {'.'.join(f)} only on one side" for f in sorted(fields(a.tree) ^ fields(b.tree))]
            found += [f"{k} {_kind(a.tree).get(k)!r} against {_kind(b.tree).get(k)!r}" for k in _SAME if _kind(a.tree).get(k) != _kind(b.tree).get(k)]
        if found:
            rows.append([name, "; ".join(found[:3])])
    line = f"{len(pairs) - len(rows)} of {len(pairs)} bad requests answered alike"
    if rows:
        line += f"; first: {rows[0][0]}: {rows[0][1]}"
    return Finding("errors", not rows, line, [Table("Differing errors", ("request", "differences (left: baseline)"), rows)] if rows else [])


def _kind(tree: Any) -> dict[str, Any]:
    inner = tree.get("error", tree) if isinstance(tree, dict) else {}
    return inner if isinstance(inner, dict) else {}
