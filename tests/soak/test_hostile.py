"""Hostile requests: whatever comes, the next ordinary request is answered. Stock SGLang gets the same, so that its faults are told from ours."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import requests

from tests.soak.hostile import TOO_LATE, Blow, blows
from tests.soak.served import Served, Stock, number

KEY = "soak-key"
# What stock SGLang 0.5.23 falls to; a server with this plugin falls to none.
STOCK_FALLS = {"chat: 10^9 log-probabilities", "generate: token ids below zero"}
# Not for strangers' random bodies: they end the server, stop it, change its weights or write files. All are behind the key.
NOT_FUZZED = (
    "shutdown|pause|continue_generation|release_memory|resume_memory|update_|weights|lora|profile|session|configure_logging|"
    "expert_distribution|slow_down|set_internal_state|dump|freeze|hicache"
)


def chosen() -> list[Blow]:
    """All blows, or those whose names hold the expression in SOAK_BLOWS."""
    some = [blow for blow in blows() if re.search(os.environ.get("SOAK_BLOWS", ""), blow.name)]
    assert len({blow.name for blow in some}) == len(some) > 0
    return some


def strike(server: Served, some: list[Blow]) -> dict[str, str]:
    """What each blow got, and ``: down`` behind it where the server then answered no ordinary request; it is started again."""
    found = {}
    for blow in some:
        began = time.monotonic()
        found[blow.name] = str(blow.send(server))
        if not server.answers() and not server.answers():
            found[blow.name] += ": down"
            server.stop()
            server.ended, server.process = False, None
            server.started()
        print(f"{time.monotonic() - began:6.1f} s  {found[blow.name]:24} {blow.name}", flush=True)
    return found


@pytest.fixture(scope="module")
def hostile(soak_logs):
    """The server under attack, as `idlm serve` starts it but for the key and a chatty log."""
    with Served("hostile", soak_logs, "--log-level", "info", "--enable-response-store", "--tool-call-parser", "qwen25", key=KEY) as server:
        yield server


def test_no_hostile_request_takes_the_server_down(hostile):
    found = strike(hostile, chosen())
    down = {name for name, got in found.items() if got.endswith("down")}
    late = {name for name, got in found.items() if got.startswith(TOO_LATE)}
    print(f"{len(found)} hostile requests, {len(down)} took the server down, {len(late)} had no answer within a minute")
    assert not down, sorted(down)


def test_random_requests_from_the_servers_own_description(hostile, tmp_path):
    """schemathesis draws bodies from /openapi.json; what it calls a failure is printed, what counts is that the server answers."""
    words = [sys.executable, "-m", "schemathesis.cli", "run", hostile.url + "/openapi.json", "-H", f"Authorization: Bearer {KEY}", "--checks", "not_a_server_error"]
    words += ["--exclude-path-regex", NOT_FUZZED, "--max-examples", str(number("SOAK_EXAMPLES", 25)), "--phases", "fuzzing", "--request-timeout", "30", "--seed", "8"]
    done = subprocess.run([*words, "--generation-database", "none", "--no-color"], capture_output=True, text=True, timeout=1500, cwd=tmp_path, env=os.environ)
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode in (0, 1) and "test cases" in done.stdout.lower(), "schemathesis did not run"
    assert hostile.alive() and hostile.answers()


def test_the_key_is_asked_for_everywhere_and_is_not_in_the_log(hostile):
    """Every route of the server's own description and ours beside it; probes and metrics are open by SGLang's rule."""
    described = hostile.get("/openapi.json").json()
    assert described["paths"]
    asked = 0
    ours = {"/idlm": {"get": {}}, "/idlm/": {"get": {}}, "/idlm/stats": {"get": {}}, "/idlm/decode": {"post": {}}}
    for path, methods in {**described["paths"], **ours, "/openapi.json": {"get": {}}, "/docs": {"get": {}}}.items():
        if path.startswith(("/health", "/ready", "/metrics")):
            continue
        for method in methods:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
                got = requests.request(method, hostile.url + path.replace("{", "").replace("}", ""), headers=headers, json={}, timeout=30).status_code
                assert got in (401, 403), f"{method} {path} with {headers or 'no key'}: {got}"
                asked += 1
    print(f"{asked} requests without the key or with a wrong one: all refused")
    logs = hostile.server_log.read_text(errors="replace") + hostile.log.read_text(errors="replace")
    assert "server_args=" in logs, "the log says nothing of the arguments"
    assert KEY not in logs, next(line for line in logs.splitlines() if KEY in line)[:300]
    assert hostile.answers()


@pytest.mark.skipif(not number("SOAK_STOCK", 0), reason="SOAK_STOCK=1: stock SGLang under the same requests")
def test_what_stock_sglang_falls_to(soak_logs, tmp_path):
    server = Stock(soak_logs, tmp_path, "--enable-response-store", "--tool-call-parser", "qwen25", "--log-level", "warning", key=KEY)
    with server:
        found = strike(server, chosen())
    down = sorted(name for name, got in found.items() if got.endswith("down"))
    print(json.dumps(down, indent=1))
    assert set(down) >= STOCK_FALLS & found.keys(), "stock SGLang stands where the list says that it falls"
