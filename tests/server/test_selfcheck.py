"""A real server that checks every answer it gives: nothing differs; and one whose acceptance is broken is found out."""

import json
import random
import re
import threading
import time

import pytest
import requests

from idlm_sglang.serving import cli
from tests.deploy.tools import queries, series
from tests.server import fleet
from tests.server.fleet import server_fixture
from tests.server.harness import CHECKPOINT, Server, chat, ids, prompts, with_pythonpath

KINDS = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8, "sampling_seed": 3},
    {"temperature": 1.5, "top_k": 5, "min_p": 0.05},
    {"temperature": 0, "stop": ["e"]},
    {"temperature": 1.0, "stop": ["and", "\n"]},
    {"temperature": 1.0, "regex": "[a-z ]{10,30}"},
    {"temperature": 0, "logit_bias": {"100": 5.0}},
    {"temperature": 0, "presence_penalty": 0.9},
    {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.4},
    {"temperature": 1.0, "ignore_eos": True},
]


def figures(server):
    found = server.metrics()
    return {event: found.get(f"idlm:selfcheck_{event}", 0.0) for event in ("total", "mismatch_total", "tie_total", "dropped_total")}


def settled(server, count, seconds=240):
    """The check counters once ``count`` answers have been decided or dropped."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = figures(server)
        if now["total"] + now["dropped_total"] >= count:
            return now
        time.sleep(0.2)
    raise AssertionError(f"{count} checks expected: {now}; {server.log.read_text(errors='replace')[-2000:]}")


def at_rest(server):
    """The check counters once they stand still: SGLang's own warm-up request is checked, too."""
    now = None
    while now != (now := figures(server)):
        time.sleep(2)
    return now


@server_fixture
def checked(logs):
    env = {"IDLM_MAX_STRIDE": "8", "IDLM_SELFCHECK": "1", "IDLM_LIVE_PAGE": "off", "SGLANG_IS_IN_CI": "1"}
    return Server("checked", CHECKPOINT, logs, "--speculative-algorithm", "ISD", "--enable-metrics", env=env)


def test_clean_serving_of_mixed_requests_has_no_mismatch(checked):
    rng = random.Random(17)
    before, served = at_rest(checked), checked.metrics()
    done = tokens = 0
    for wave, texts in enumerate([prompts(52, seed=230 + i) for i in range(3)]):
        calls = [{"prompt": p, "max_new_tokens": rng.randrange(1, 40), **KINDS[i % len(KINDS)]} for i, p in enumerate(texts)]
        answers = checked.many([{**c, "stride": rng.choice([1, 2, 3, 4, 8])} if i % 3 else c for i, c in enumerate(calls)], 12)
        body = {"text": chat("Tell me a story."), "sampling_params": {"temperature": 1.0, "max_new_tokens": 20, "n": 3}}
        several = checked.post("/generate", body).json()
        ask = {"model": "default", "messages": [{"role": "user", "content": f"What is {wave} + 7?"}], "max_tokens": 30}
        chats = [checked.post("/v1/chat/completions", ask | {"temperature": t}).json() for t in (0, 1.0)]
        streamed = checked.post("/generate", {"text": texts[0], "stream": True, "sampling_params": {"max_new_tokens": 20}}, stream=True)
        last = json.loads([line for line in streamed.iter_lines() if line.startswith(b"data: {")][-1][6:])
        tokens += sum(len(ids(a)) - 1 for a in [*answers, *several, last]) + sum(c["usage"]["completion_tokens"] - 1 for c in chats)
        done += len(answers) + len(several) + len(chats) + 1
        # Before the bounded queue overflows.
        after = settled(checked, before["total"] + done)
    delta = {event: after[event] - before[event] for event in after}
    print(f"{done} mixed answers checked at one token per step: {delta}")
    assert delta == {"total": done, "mismatch_total": 0, "tie_total": 0, "dropped_total": 0}
    now = checked.metrics()
    assert now["idlm:tokens_committed_total"] - served["idlm:tokens_committed_total"] == tokens, "checks are no service"
    assert sum(v for k, v in now.items() if 'reason="selfcheck"' in k) >= done


def test_a_check_waits_until_no_client_is_served(checked):
    before = at_rest(checked)
    asks = {"temperature": 0, "ignore_eos": True}
    held = threading.Thread(target=checked.generate, kwargs={"prompt": chat("Tell me a story."), "max_new_tokens": 400, "stride": 1, **asks})
    held.start()
    finished = 0
    while held.is_alive():
        checked.generate("Hello", max_new_tokens=4, **asks)
        finished += 1
        during = figures(checked)
        if held.is_alive():
            assert during == before
        if finished == 20:
            break
    held.join()
    after = settled(checked, before["total"] + finished + 1)
    assert finished > 3 and after["mismatch_total"] == before["mismatch_total"]


def test_a_check_makes_room_for_a_client_and_comes_again(checked):
    def admitted():
        return sum(v for k, v in checked.metrics().items() if 'reason="selfcheck"' in k)

    def aborted():
        lines = requests.get(checked.url + "/metrics", timeout=30).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("sglang:num_aborted_requests_total"))

    before, started, hangups = at_rest(checked), admitted(), aborted()
    checked.generate(chat("Tell me a story."), temperature=0, ignore_eos=True, max_new_tokens=800, stride=8)
    while admitted() == started:
        time.sleep(0.02)
    answers = 1
    for _ in range(3):
        checked.generate("Hello", temperature=0, max_new_tokens=4)
        answers += 1
    after = settled(checked, before["total"] + answers)
    print(f"{admitted() - started:.0f} checks begun for {answers} answers")
    assert admitted() - started > answers, "no check was cut short"
    assert after == before | {"total": before["total"] + answers}
    assert aborted() == hangups, "a check that makes room is no aborted request"


def test_the_cache_is_flushed_while_an_answer_is_checked(checked):
    """SGLang flushes only while nothing runs; a check ends for it and comes again."""
    before = at_rest(checked)
    checked.generate("river", temperature=0, max_new_tokens=300, ignore_eos=True)
    for _ in range(8):
        # By now the check has begun, and it takes longer than this.
        time.sleep(0.2)
        assert checked.post("/flush_cache", {}).status_code == 200
        assert figures(checked)["total"] == before["total"], "the check was over: flushing was no test"
    after = settled(checked, before["total"] + before["dropped_total"] + 1)
    assert after["mismatch_total"] == before["mismatch_total"]


def test_dashboard_rules_and_autoscaler_ask_for_series_that_the_server_has(checked):
    """Here because this server has every series of ours. Streams and refusals have series only once there was one."""
    body = {"text": chat("Hi"), "sampling_params": {"max_new_tokens": 8}}
    list(checked.post("/generate", body | {"stream": True}, stream=True).iter_lines())
    refused = checked.post("/generate", {"text": "Hi", "sampling_params": {"custom_params": {"idlm_stride": 99}}})
    assert refused.status_code == 400
    at_rest(checked)
    exposed = {}
    for line in requests.get(checked.url + "/metrics", timeout=30).text.splitlines():
        if found := re.match(r"([\w:]+)(?:\{(.*)\})? ", line):
            exposed.setdefault(found[1], set()).update(re.findall(r'(\w+)="', found[2] or ""))
    added = {"arm", "instance", "job"}  # Prometheus's own labels, and the scrape configuration's
    asked = {(where, name, frozenset(labels)) for where, text in queries().items() for name, labels in series(text)}
    missing = sorted(f"{where}: {name}" for where, name, _ in asked if name not in exposed)
    assert not missing, missing
    unlabelled = sorted(f"{where}: {name} {labels - exposed[name] - added}" for where, name, labels in asked if labels - exposed[name] - added)
    assert not unlabelled, unlabelled
    print(f"{len({name for _, name, _ in asked})} series asked for in {len(queries())} places, all among the {len(exposed)} that the server has")
    assert len(asked) > 40


def test_an_orderly_stop_does_not_wait_for_the_queue(checked, request):
    """The last test of this server, whose live page is off."""
    if not fleet.of(request.config).is_last("checked", request.node):
        pytest.skip("run in an order in which other tests of its server come behind it")
    assert [checked.post("/idlm/decode", {}).status_code, *(requests.get(checked.url + path, timeout=60).status_code for path in ("/idlm", "/idlm/stats"))] == [404] * 3
    calls = [{"prompt": p, "temperature": 0, "ignore_eos": True, "max_new_tokens": 400} for p in prompts(8, seed=240)]
    checked.many(calls, 8)
    checked.process.terminate()
    assert checked.process.wait(60) in (0, -9, -15)
    assert "Traceback" not in checked.log.read_text(errors="replace")


@server_fixture
def corrupted(logs):
    env = {"PYTHONPATH": with_pythonpath("corrupted"), "IDLM_SELFCHECK": "1"}
    return Server("corrupted", CHECKPOINT, logs, "--speculative-algorithm", "ISD", "--enable-metrics", env=env)


def test_a_broken_acceptance_is_found_and_its_line_replays(corrupted, tmp_path, capsys):
    before = at_rest(corrupted)
    calls = [{"prompt": p, "max_new_tokens": 32, **KINDS[i % 4]} for i, p in enumerate(prompts(24, seed=241))]
    corrupted.many(calls, 8)
    after = settled(corrupted, before["total"] + len(calls))
    wrong = after["mismatch_total"] - before["mismatch_total"]
    print(f"{wrong:.0f} of {len(calls)} answers with broken acceptance were found")
    assert wrong >= 6 and after["tie_total"] == 0
    lines = [line for line in corrupted.log.read_text().splitlines() if "SELF-CHECK MISMATCH" in line]
    assert len(lines) == after["mismatch_total"]
    file = tmp_path / "mismatches.jsonl"
    file.write_text("\n".join(line.split("; replay: ")[1] for line in lines))
    capsys.readouterr()
    assert cli.main(["replay", str(file), "--url", corrupted.url]) == 1
    told = capsys.readouterr().out.splitlines()
    for number, line in enumerate(lines):
        at = line.split("first at token ")[1].split(":")[0]
        assert told[number].startswith(f"line {number + 1}: token {at} differs: ")
