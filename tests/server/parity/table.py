"""``python -m tests.server.parity.table [--write]``: docs/parity.md, from the tests that prove each of its rows.

A test says by ``@pytest.mark.parity("key", ...)`` which rows it proves.
"""

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.server.parity.in_tree import ALGORITHMS, IN_TREE, Cell

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "parity.md"


@dataclass(frozen=True)
class Row:
    """A feature: what is required of it, what a request with it gets from ISD, and whether that is several tokens per forward."""

    name: str
    required: str
    isd: str
    strided: bool = True


ROWS = {
    "sampling": Row("temperature, top_p, top_k, min_p", "AR's distribution", "strided, exact"),
    "seed": Row("seed, sampling_seed", "AR's tokens, at any stride, batch and restart", "strided, same tokens"),
    "penalties": Row("frequency, presence, repetition penalties, min_new_tokens", "AR's tokens", "strided, counted on the device"),
    "logit_bias": Row("logit_bias", "applied", "strided, on every row"),
    "logprobs": Row("logprobs, top_logprobs, echo", "AR's values within 2e-3 for every committed token (a chat's stream leaves out tokens that come without text, as AR's does)", "strided, same values"),
    "grammar": Row("JSON schema and object, regex, EBNF, structural tag", "valid, AR's text", "strided, the automaton is walked over the drafts (one token per step with outlines)"),
    "tools": Row("forced and auto tools, reasoning parser", "valid, AR's text", "strided"),
    "stops": Row("stop strings, ids and expressions, max_tokens, ignore_eos, no_stop_trim", "nothing behind the stop, anywhere", "strided, cut where AR stops"),
    "batches": Row("n, best_of, lists, input_ids; input_embeds", "as AR", "strided; input_embeds as AR"),
    "lifecycle": Row("streams, disconnects, abort, pause, flush", "as AR, nothing leaks", "as AR"),
    "custom_processors": Row("custom logit processors", "applied", "one token per step", strided=False),
    "hidden_lora": Row("hidden states, LoRA adapters, beam search", "served, or a 400 that names it", "refused with a 400 that names it", strided=False),
    "meta": Row("usage and meta_info", "AR's values; figures of speculation are true", "as AR, with figures of speculation beside"),
    "endpoints": Row("chat, completions, responses, generate, messages, tokenize, score, and the rest", "work", "as AR"),
}


class Collector:
    """Remembers which test functions carry which key."""

    def __init__(self):
        self.proofs: dict[str, set[str]] = {}

    def pytest_collection_modifyitems(self, items):
        for item in items:
            for mark in item.iter_markers("parity"):
                for key in mark.args:
                    name = f"{item.path.relative_to(ROOT)}::{item.originalname}"
                    self.proofs.setdefault(key, set()).add(name)


def proofs() -> dict[str, list[str]]:
    """Tests by the key they prove."""
    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", str(ROOT / "tests")], plugins=[collector])
    if code != 0:
        raise RuntimeError(f"pytest cannot collect the tests:\n{out.getvalue()[-2000:]}")
    if unknown := collector.proofs.keys() - ROWS.keys():
        raise RuntimeError(f"parity markers without a row: {sorted(unknown)}")
    return {key: sorted(found) for key, found in collector.proofs.items()}


def page(found: dict[str, list[str]]) -> str:
    """The whole of docs/parity.md."""
    notes: dict[str, int] = {}
    lines = [
        "# Parity: what a request may ask for",
        "",
        "Whatever an SGLang AR server accepts is accepted with `--speculative-algorithm ISD`, with the same meaning and, where it is",
        "deterministic, the same tokens. ISD's column is proved by the tests in the last one. The others are stock SGLang 0.5.23 without the",
        "plugin, read from its source and not run (the notes name files and lines under `sglang/srt`).",
        "This page is written by `python -m tests.server.parity.table --write`.",
        "",
        "| feature | required | ISD | " + " | ".join(ALGORITHMS) + " | proved by |",
        "|---|---|---|" + "---|" * (len(ALGORITHMS) + 1),
    ]
    for key, row in ROWS.items():
        cells = [f"{cell.verdict}{_mark(cell, notes)}" for cell in (IN_TREE[key][name] for name in ALGORITHMS)]
        tests = "<br>".join(_link(name) for name in found.get(key, []))
        lines.append(f"| {row.name} | {row.required} | {row.isd} | " + " | ".join(cells) + f" | {tests} |")
    lines += [
        "",
        "ISD: *strided*, several tokens per forward; *one token per step*, in the same batch as strided requests; *refused*, an HTTP 400.",
        "The others: *yes*, honoured; *partly*, with the limit in the note; *refused*, an HTTP error or an error at start; *ignored*, accepted without",
        "effect; *wrong*, applied, but not as AR would; *unclear*, the source alone does not tell.",
        "",
        *[f"[^{number}]: {note}" for note, number in notes.items()],
    ]
    return "\n".join(lines) + "\n"


def _mark(cell: Cell, notes: dict[str, int]) -> str:
    text = f"{cell.note} (`{cell.evidence}`)"
    return f"[^{notes.setdefault(text, len(notes) + 1)}]"


def _link(name: str) -> str:
    file, function = name.split("::")
    return f"[{function.removeprefix('test_').replace('_', ' ')}](../{file})"


def main() -> None:
    text = page(proofs())
    if "--write" in sys.argv[1:]:
        PAGE.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
