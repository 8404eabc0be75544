"""What `idlm parity` was asked for: its flags, checked, in one frozen dataclass."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from idlm_sglang.config import SettingError, whole_number

AUTO, EXACT, DISTRIBUTION = "auto", "exact", "distribution"
SEEDED = (AUTO, EXACT, DISTRIBUTION)
DEFAULT_TIE = 0.05
DEFAULT_ALPHA = 0.01
# Two cells of a chi-square test need as many answers of both servers together.
FEWEST_SAMPLES = 20

_DESCRIPTION = """\
Send the same requests to two servers and compare: greedy and seeded answers token by token, sampled ones by distribution,
fields, errors, scores and speed. The verdict is the exit code; --out keeps a report as HTML, Markdown and JSON.

FILE is JSONL, one request a line: a body of /v1/chat/completions, {"prompt": "..."} or a JSON string for a single question,
or {"path": "/v1/completions" | "/generate" | "/v1/chat/completions", "request": {...}}, as `idlm replay` reads it. A
line's "expected" is a text that the answer must contain; it is not sent. Without --prompts a bundled file is used."""

_EPILOG = f"""\
examples:
  idlm parity --baseline http://ar:30000 --candidate http://isd:30000 --prompts requests.jsonl --out report
  idlm parity --baseline URL --candidate URL --min-speed-ratio 1.2 --tie-margin 0.5      bfloat16 servers; the candidate must be faster

what counts as a difference:
  greedy   a first differing token, unless the two best there, by either server's word, are within --tie-margin in log-probability (a near-tie: low
           precision may decide it either way). {DEFAULT_TIE} suits float32; for bfloat16 take 0.5.
  seeded   the same without a margin, where both servers draw by this plugin's sampler; else by distribution (--seeded).
  sampled  two-sample chi-square tests; with equal servers a false alarm in at most a share of --alpha of the runs (Holm).
  score    the candidate is worse: the 95 % interval of the paired difference lies below 0.
  speed    nothing, unless --min-speed-ratio is given.

exit code: 0 parity, 1 not, 2 a mistake in the command, or a server that does not answer."""


@dataclass(frozen=True)
class Plan:
    """Everything the run needs.

    Attributes:
        baseline, candidate: base addresses, without /v1.
        prompts: the file, or None for the bundled one.
        limit: requests of the file that are used, or None for all.
        tie_margin: nats between the two best tokens, up to which a greedy difference is a near-tie.
        seeded: ``auto``, ``exact`` or ``distribution``.
        samples: answers of each side to each sampled prompt; 0 leaves the tests out.
        sampled_prompts: prompts that are so sampled.
        alpha: share of false alarms of all tests together.
        speed_rounds: rounds of timed requests on each side; 0 leaves them out.
        min_speed_ratio: tokens per second over the baseline's, below which there is no parity; None: not judged.
    """

    baseline: str
    candidate: str
    prompts: Path | None
    limit: int | None
    api_key: str | None
    candidate_api_key: str | None
    concurrency: int
    timeout: float
    tie_margin: float
    seeded: str
    samples: int
    sampled_prompts: int
    alpha: float
    speed_rounds: int
    min_speed_ratio: float | None
    out: Path | None


def parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    made = kind(prog="idlm parity", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    option = made.add_argument
    option("--baseline", metavar="URL", required=True, help="the server whose answers are right")
    option("--candidate", metavar="URL", required=True, help="the server that is to take its place")
    option("--prompts", metavar="FILE", help="JSONL of requests, - for standard input (default: a bundled file)")
    option("--limit", metavar="N", help="only the first N requests of FILE")
    option("--out", metavar="DIR", help="write report.html, report.md and report.json there")
    option("--api-key", metavar="KEY", help="sent as a bearer token (default: the variable API_KEY, if set)")
    option("--candidate-api-key", metavar="KEY", help="the candidate's, where it has another")
    option("--concurrency", metavar="N", default="4", help="requests at a time on each server (default 4)")
    option("--timeout", metavar="S", default="600", help="seconds for one answer (default 600)")
    option("--tie-margin", metavar="NATS", default=str(DEFAULT_TIE), help=f"see below (default {DEFAULT_TIE})")
    option("--seeded", metavar="HOW", default=AUTO, help="auto (default: exact where both servers show the plugin), exact or distribution")
    option("--samples", metavar="N", default="200", help="answers of each server to each sampled prompt; 0: no tests (default 200)")
    option("--sampled-prompts", metavar="N", default="3", help="prompts that are sampled so (default 3)")
    option("--alpha", metavar="SHARE", default=str(DEFAULT_ALPHA), help=f"share of runs with a false alarm among the tests, 0 to 0.5 (default {DEFAULT_ALPHA})")
    option("--speed-rounds", metavar="N", default="4", help="timed rounds on each server, one after the other in turn; 0: none (default 4)")
    option("--min-speed-ratio", metavar="X", help="least tokens per second over the baseline's (default: not judged)")
    return made


def resolve(given: argparse.Namespace) -> Plan:
    """Raises :class:`SettingError` for a value that cannot be served."""
    if given.seeded not in SEEDED:
        raise SettingError(f"--seeded {given.seeded} is not valid; allowed: {', '.join(SEEDED)}")
    rounds = whole_number(f"--speed-rounds {given.speed_rounds}", given.speed_rounds, 0, 1000)
    least = None if given.min_speed_ratio is None else _number("--min-speed-ratio", given.min_speed_ratio, 0.0, 1000.0)
    if least is not None and not rounds:
        raise SettingError(f"--min-speed-ratio {given.min_speed_ratio} needs timed rounds; allowed: --speed-rounds 2 or more")
    key = given.api_key or os.environ.get("API_KEY")
    return Plan(
        baseline=_url("--baseline", given.baseline),
        candidate=_url("--candidate", given.candidate),
        prompts=None if given.prompts is None else Path(given.prompts),
        limit=None if given.limit is None else whole_number(f"--limit {given.limit}", given.limit, 1, None),
        api_key=key,
        candidate_api_key=given.candidate_api_key or key,
        concurrency=whole_number(f"--concurrency {given.concurrency}", given.concurrency, 1, 1024),
        timeout=_number("--timeout", given.timeout, 0.001, 1e6),
        tie_margin=_number("--tie-margin", given.tie_margin, 0.0, 100.0),
        seeded=given.seeded,
        samples=_samples(given.samples),
        sampled_prompts=whole_number(f"--sampled-prompts {given.sampled_prompts}", given.sampled_prompts, 1, 1000),
        alpha=_number("--alpha", given.alpha, 1e-9, 0.5),
        speed_rounds=rounds,
        min_speed_ratio=least,
        out=None if given.out is None else Path(given.out),
    )


def _samples(text: str) -> int:
    count = whole_number(f"--samples {text}", text, 0, 100_000)
    if 0 < count < FEWEST_SAMPLES:
        raise SettingError(f"--samples {text} is too few to tell distributions apart; allowed: 0 (none), or {FEWEST_SAMPLES} to 100000")
    return count


def _url(flag: str, text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingError(f"{flag} {text} is not valid; allowed: http://HOST:PORT or https://HOST:PORT")
    return text.rstrip("/").removesuffix("/v1")


def _number(flag: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise SettingError(f"{flag} {text} is not valid; allowed: a number from {low:g} to {high:g}")
    return value
