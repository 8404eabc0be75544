"""Two answers to one request, field by field.

Everything in an answer must be equal but what ``IGNORED`` and its kin name; floats (in what is left: log
probabilities and scores) may differ by 2e-3. Streams are put together from their chunks first: how an answer is cut
into chunks is no part of it.
"""

import json
from dataclasses import dataclass

from idlm_sglang.serving.replay import CHAT, COMPLETIONS, GENERATE

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
TOLERANCE = 2e-3
# Below this a probability is no normal float32, and AR's logarithm of it is a coarse step.
FLOOR = -87.0
# Ids and times; how fast and in what company a request was served; figures of speculative decoding; the seed, which AR does not report.
IGNORED = {
    "id", "item_id", "call_id", "tool_use_id", "created", "created_at", "completed_at", "decode_throughput", "cached_tokens", "cached_tokens_details",
    "num_retractions", "seed",
}  # fmt: skip
IGNORED_PREFIX = ("spec_",)
IGNORED_SUFFIX = ("_ts", "_time", "_latency", "_wait")
# Strings that grow from chunk to chunk of a stream; others are said once or repeated.
GROWING = {"content", "reasoning_content", "text", "arguments", "thinking", "partial_json", "delta"}
# Why an answer ended, and what it has only if it got that far; sampled ones end where they end.
ENDING = ("finish_reason", "matched_stop", "incomplete_details", "stop_reason", "stop_sequence", "tool_calls")
TOPS = ("top_logprobs", "output_top_logprobs", "input_top_logprobs")


@dataclass
class Answer:
    """HTTP status and the JSON tree, that of a stream put together."""

    status: int
    tree: object


def parsed(text: str) -> object:
    """JSON where it is JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


# Streams.


def join_generate(chunks: list) -> dict:
    """Native chunks hold everything so far: the last one of each index counts, and each must continue the one before."""
    last: dict[int, dict] = {}
    others = []
    for chunk in chunks:
        if not isinstance(chunk, dict) or "meta_info" not in chunk:
            others.append(chunk)  # an error, or the end
            continue
        seen = last.get(chunk.get("index", 0))
        if seen is not None:
            assert chunk["output_ids"][: len(seen["output_ids"])] == seen["output_ids"], "a stream took tokens back"
            assert chunk["text"].startswith(seen["text"]), "a stream took text back"
        last[chunk.get("index", 0)] = chunk
    return {"chunks": [last[i] for i in sorted(last)], "others": others}


class Lagging(str):
    """Text that its stream had not told to the end: SGLang's tool parsers are one chunk behind when an answer is cut off."""


def _append(whole: dict, part: dict) -> None:
    """Add a delta: texts and lists grow, objects are joined in turn, anything else replaces what was said before."""
    for key, value in part.items():
        old = whole.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            _append(old, value)
        elif key == "tool_calls" and value:
            calls = whole[key] = old or []
            for call in value:
                while len(calls) <= call["index"]:
                    calls.append({})
                _append(calls[call["index"]], {k: v for k, v in call.items() if k != "index"})
        elif isinstance(value, str) and isinstance(old, str) and key in GROWING:
            whole[key] = old + value
        elif isinstance(value, list) and isinstance(old, list):
            whole[key] = old + value
        elif value is not None or key not in whole:
            whole[key] = value


def _drop_silent(choice: dict) -> None:
    """Leave out the log-probabilities of tokens that no text of the stream shows, such as the one that ends an answer.

    Where no parser is at work SGLang sends a step's log-probabilities with the step's text, and those of a step without text not at all. Which these are
    is a matter of how the answer is cut into chunks: a step of several tokens has text where one of them does.
    """
    delta, logprobs = choice.get("delta") or {}, choice.get("logprobs") or {}
    if delta.get("content") and logprobs.get("content") and not (delta.get("reasoning_content") or delta.get("tool_calls")):
        logprobs["content"] = [entry for entry in logprobs["content"] if entry["token"] in delta["content"]]


def join_openai(chunks: list) -> dict:
    """Chat and completion chunks."""
    whole: dict = {"choices": {}, "end": chunks[-1]}
    for chunk in chunks[:-1]:
        for choice in chunk.pop("choices", []):
            _append(whole["choices"].setdefault(choice["index"], {}), {k: v for k, v in choice.items() if k != "index"})
        _append(whole, chunk)
    for choice in whole["choices"].values():
        if choice.get("finish_reason") == "length":
            for call in choice.get("delta", {}).get("tool_calls") or []:
                call["function"]["arguments"] = Lagging(call["function"]["arguments"])
        _drop_silent(choice)
        # A first chunk without text says "" or null, by how much the first step had to show.
        for field in ("content", "reasoning_content", "text"):
            for place in (choice, choice.get("delta", {})):
                if field in place and not place[field]:
                    place[field] = None
    return whole


def join_events(chunks: list) -> dict:
    """Anthropic messages: blocks grow by their deltas."""
    whole: dict = {"blocks": {}, "events": []}
    for chunk in chunks:
        kind = chunk["type"]
        if kind == "content_block_start":
            whole["blocks"][chunk["index"]] = dict(chunk["content_block"])
        elif kind == "content_block_delta":
            _append(whole["blocks"][chunk["index"]], {k: v for k, v in chunk["delta"].items() if k != "type"})
        else:
            whole["events"].append(chunk)
    return whole


def join_responses(chunks: list) -> dict:
    """Responses: the text of the deltas beside the events that carry whole items."""
    whole: dict = {"deltas": {}, "events": []}
    for chunk in chunks:
        if not isinstance(chunk, dict):
            whole["events"].append(chunk)
        elif chunk["type"].endswith(".delta"):
            found = whole["deltas"].setdefault(chunk["type"], {"delta": "", "logprobs": []})
            _append(found, {k: chunk[k] for k in ("delta", "logprobs") if k in chunk})
        else:
            whole["events"].append({k: v for k, v in chunk.items() if k != "sequence_number"})
    if any(isinstance(event, dict) and event["type"] == "response.incomplete" for event in whole["events"]):
        whole = _lagging(whole)
    return whole


def _lagging(tree, key: str = ""):
    """The tree with the arguments of its function calls marked."""
    if isinstance(tree, dict):
        called = key == "response.function_call_arguments.delta"
        return {k: _lagging(v, "arguments" if called and k == "delta" else k) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_lagging(item, key) for item in tree]
    return Lagging(tree) if key == "arguments" and isinstance(tree, str) else tree


_JOINERS = {GENERATE: join_generate, CHAT: join_openai, COMPLETIONS: join_openai, RESPONSES: join_responses, MESSAGES: join_events}


def join(path: str, chunks: list) -> dict:
    """The events of a stream of ``path`` as one tree."""
    return _JOINERS[path](chunks)


# Comparison.


def differences(left: Answer, right: Answer, exact: bool = True, tolerance: float = TOLERANCE) -> list[str]:
    """Where the answers differ, one line each; without ``exact`` only status and fields are compared. ``tolerance``: of floats."""
    if left.status != right.status:
        return [f"status: {left.status} against {right.status} {json.dumps(right.tree)[:300]}"]
    if not exact:
        a, b = fields(left.tree), fields(right.tree)
        return [f"field only on one side: {'.'.join(f)}" for f in sorted(a ^ b)]
    found: list[str] = []
    _compare(left.tree, right.tree, "", found, tolerance)
    return found


def ignored(key) -> bool:
    return key in IGNORED or str(key).startswith(IGNORED_PREFIX) or str(key).endswith(IGNORED_SUFFIX)


def fields(tree, path=()) -> set[tuple]:
    """Names of all fields, whatever list they are in."""
    if isinstance(tree, dict):
        kept = {k: v for k, v in tree.items() if not ignored(k) and k not in ENDING}
        if path and path[-1] in TOPS:
            return set()
        return {(*path, str(k)) for k in kept}.union(*(fields(v, (*path, str(k))) for k, v in kept.items()))
    if isinstance(tree, list):
        return set().union(*(fields(v, path) for v in tree))
    return set()


def near(a: float, b: float, tolerance: float = TOLERANCE) -> bool:
    return a == b or abs(a - b) <= tolerance or max(a, b) < FLOOR


def _compare(a, b, path: str, found: list[str], tolerance: float) -> None:
    name = path.rsplit(".", 1)[-1]
    if isinstance(a, dict) and isinstance(b, dict):
        if name.split("[")[0] in TOPS:
            return _compare_tops(a, b, path, found, tolerance)
        for key in sorted({*a, *b}, key=str):
            if ignored(key):
                continue
            where = f"{path}.{key}"
            if key not in a or key not in b:
                found.append(f"{where}: only in {'left' if key in a else 'right'}: {_short((a if key in a else b)[key])}")
            else:
                _compare(a[key], b[key], where, found, tolerance)
    elif isinstance(a, list) and isinstance(b, list):
        if _is_top(a) and _is_top(b) and name.split("[")[0] in TOPS:
            return _compare_tops(_top(a), _top(b), path, found, tolerance)
        if len(a) != len(b):
            found.append(f"{path}: {len(a)} entries against {len(b)}: {_short(a)} against {_short(b)}")
        for i, (x, y) in enumerate(zip(a, b)):
            _compare(x, y, f"{path}[{i}]", found, tolerance)
    elif isinstance(a, float) and isinstance(b, float):
        if not near(a, b, tolerance):
            found.append(f"{path}: {a} against {b}")
    elif isinstance(a, Lagging) and isinstance(b, Lagging):
        if not (a.startswith(b) or b.startswith(a)):
            found.append(f"{path}: {_short(a)} against {_short(b)}")
    elif a != b or type(a) is not type(b):
        found.append(f"{path}: {_short(a)} against {_short(b)}")


def _is_top(entries: list) -> bool:
    """One position's list of candidates: ``[[logprob, id, text], ...]`` or ``[{"token": ..., "logprob": ...}, ...]``."""
    return bool(entries) and all(
        (isinstance(e, list) and len(e) == 3 and isinstance(e[0], float)) or (isinstance(e, dict) and "logprob" in e) for e in entries
    )


def _top(entries: list) -> dict:
    return {(e[1] if isinstance(e, list) else e["token"]): (e[0] if isinstance(e, list) else e["logprob"]) for e in entries}


def _compare_tops(a: dict, b: dict, path: str, found: list[str], tolerance: float) -> None:
    """Candidates by token. Two of nearly equal probability may stand in either order, or one of them fall off the end."""
    if len(a) != len(b):
        found.append(f"{path}: {_short(a)} against {_short(b)}")
        return
    for key in {*a, *b}:
        x, y = a.get(key, min(a.values())), b.get(key, min(b.values()))
        if not near(x, y, tolerance):
            found.append(f"{path}[{key!r}]: {a.get(key)} against {b.get(key)}")


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:200] + "..."
