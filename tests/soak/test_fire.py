"""Thousands of requests of random features on a KV pool too small for them: right answers, and nothing grows."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.parity.compare import ask
from tests.server.test_tight import wait_idle
from tests.soak.load import ABORT, HANG_UP, WHOLE, Load, pool
from tests.soak.served import Served, number
from tests.soak.watch import FILES, MIB, RSS, THREADS, Watch

SEED = 8
CLIENTS = 32
# For features only: a pool of requests small enough that all are asked of AR, large enough to hold every feature many times.
KNOWN = 1200
# A pool of 1,300 tokens for 32 requests; admission as if answers were short, so that it runs full in their midst.
TIGHT = ("--max-total-tokens", "1300", "--max-running-requests", "32", "--schedule-conservativeness", "0.05", "--chunked-prefill-size", "256", "--enable-mixed-chunk")
FEATURES = ("--enable-custom-logit-processor", "--tool-call-parser", "qwen25", "--reasoning-parser", "qwen3", "--enable-response-store")
# What may be there at the end that was not at its beginning: per process, over the settled part of the run.
BOUND_MIB = 24.0
BOUND_FILES = BOUND_THREADS = 3.0
WARM = 0.02  # of the requests, asked before anything is compared with the start


def counters(server: Served) -> dict[str, float]:
    """``/metrics`` summed over labels."""
    found: dict[str, float] = {}
    for name, value in re.findall(r"^([a-z_:]+)(?:\{[^}]*\})? (\S+)$", server.get("/metrics").text, re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    return found


@pytest.fixture(scope="module")
def known(soak_logs, soak_requests):
    """Requests with the answers that autoregressive serving gives them, asked with room for all."""
    some = pool(min(KNOWN, max(200, soak_requests)), SEED)
    with Served("ar", soak_logs, "--ar", "--disable-overlap-schedule", *FEATURES) as server, ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda case: ask(server, case), some))
    return list(zip(some, answers))


def test_under_fire(known, soak_logs, soak_requests):
    minutes = number("SOAK_MINUTES", 90)
    # Behind a retraction SGLang admits less for some steps; few of them, so that the pool soon runs full again.
    env = {"IDLM_CPU_OVERLAP": "1", "SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS": "5"}
    with Served("tight", soak_logs, "--max-stride", "8", "--selfcheck", "0.02", *TIGHT, *FEATURES, env=env) as server:
        load, warm = Load(server, known, SEED), max(50, int(WARM * soak_requests))
        load.run(range(warm), CLIENTS)
        settle(server)
        processes, start = server.processes(), counters(server)
        assert set(processes) == {"launcher", "http", "scheduler", "detokenizer"}
        held = {role: (p.num_fds(), p.num_threads()) for role, p in processes.items()}
        watch = Watch(processes, load.answered, every=max(0.5, soak_requests / 4000))
        began = time.monotonic()
        load.run(range(warm, soak_requests), CLIENTS, until=began + 60 * minutes)
        seconds = time.monotonic() - began
        watch.end()
        end = counters(server)
        settle(server)
        after = {role: (p.num_fds(), p.num_threads()) for role, p in server.processes().items()}
        figures = report(load, watch, start, end, seconds, held, after)
        print(figures)
        (soak_logs / "figures.txt").write_text(figures)
        assert not load.wrong, "\n".join([f"{len(load.wrong)} wrong", *load.wrong[:20]])
        assert load.done[WHOLE] and load.done[HANG_UP] and load.done[ABORT]
        assert end["sglang:num_retracted_requests_total"] > start.get("sglang:num_retracted_requests_total", 0.0), "the pool was large enough for this load"
        assert {role: p.pid for role, p in server.processes().items()} == {role: p.pid for role, p in processes.items()}, "a process was replaced"
        for role, series in watch.series.items():
            for what, column, unit, bound in (("resident MiB", RSS, MIB, BOUND_MIB), ("files", FILES, 1, BOUND_FILES), ("threads", THREADS, 1, BOUND_THREADS)):
                grown = series.growth(column)[1] / unit
                assert grown < bound, f"{role}: {what} grew by {grown:.1f} over the settled part; bound {bound}"
            # Handles of the last connections are closed by now; a thread pool may still stand.
            assert after[role][0] - held[role][0] <= BOUND_FILES, f"{role}: {held[role][0]} files at the start, {after[role][0]} at the end"
        assert counters(server).get("idlm:selfcheck_mismatch_total", 0.0) == 0.0
        assert server.answers()


def settle(server: Served) -> None:
    """Nothing runs or waits, and a flush gives the whole pool back."""
    wait_idle(server, 120)
    assert server.post("/flush_cache?timeout=60", None).status_code == 200
    deadline = time.monotonic() + 20
    while (left := server.idle_tokens()) != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert left == (0, 0), f"KV tokens in use and requests that run or wait: {left}"


def report(load: Load, watch: Watch, start: dict, end: dict, seconds: float, held: dict, after: dict) -> str:
    """What was done and what was found, as lines of text."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(load.done.items()))
    gained = {name: end.get(name, 0.0) - start.get(name, 0.0) for name in end}
    lines = [
        f"{load.answered()} requests in {seconds:.0f} s: {kinds}; {load.exact} of the answers determined and compared whole, {len(load.wrong)} wrong",
        f"retractions {gained['sglang:num_retracted_requests_total']:.0f}, forwards {gained['idlm:forwards_total']:.0f}, tokens {gained['idlm:tokens_committed_total']:.0f}; "
        f"self-checks {gained.get('idlm:selfcheck_total', 0):.0f}, mismatches {gained.get('idlm:selfcheck_mismatch_total', 0):.0f}",
    ]
    for role, series in watch.series.items():
        rows = series.settled()
        slope, grown = series.growth(RSS)
        lines.append(
            f"{role:12} resident {rows[0][RSS] / MIB:.1f} to {rows[-1][RSS] / MIB:.1f} MiB, {slope / MIB:+.3f} MiB per 1,000 requests ({grown / MIB:+.1f} MiB); "
            f"files {held[role][0]} to {after[role][0]} (up to {rows[:, FILES].max():.0f}), threads {held[role][1]} to {after[role][1]} (up to {rows[:, THREADS].max():.0f})"
        )
    series = {role: [[round(x, 1) for x in row] for row in each.rows[:: max(1, len(each.rows) // 200)]] for role, each in watch.series.items()}
    return "\n".join(lines) + "\nsamples " + json.dumps(series)
