"""Two replicas behind SGLang's router, one of them killed under load: answers stay right, and a restarted one is taken back."""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import requests

from idlm_sglang.serving.ports import free_port
from tests.soak.served import Served

CLIENTS = 8
QUESTIONS = [f"What is {a} + {b}?" for a in range(11, 23) for b in (7, 16, 31)]


def body(question: str) -> dict:
    return {"model": "m", "messages": [{"role": "user", "content": question}], "temperature": 1.0, "seed": 9, "max_tokens": 40, "ignore_eos": True}


class Clients:
    """Clients that ask until told to end; each answer is compared with the known one."""

    def __init__(self, url: str, known: dict[str, str]):
        self.url, self.known, self.rows, self.over = url, known, [], threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(i,), daemon=True) for i in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def run(self, number: int) -> None:
        rng = random.Random(number)
        while not self.over.is_set():
            question = rng.choice(QUESTIONS)
            began = time.monotonic()
            try:
                reply = requests.post(self.url + "/v1/chat/completions", json=body(question), timeout=60)
                got = "failed" if reply.status_code >= 500 else "refused"
                if reply.status_code == 200:
                    got = "right" if reply.json()["choices"][0]["message"]["content"] == self.known[question] else "wrong"
                else:
                    got += f" {reply.status_code}"
            except requests.Timeout:
                got = "hung"
            except (requests.RequestException, ValueError, KeyError) as error:
                got = f"failed {type(error).__name__}"
            self.rows.append((began, time.monotonic(), got))
            if got != "right":
                time.sleep(0.05)

    def end(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(90)

    def between(self, start: float, end: float) -> Counter:
        """What requests got that began in that time."""
        return Counter(got for began, _, got in self.rows if start <= began < end)


def served_by(server: Served) -> float:
    """Requests that a replica has answered."""
    text = server.get("/metrics").text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith("sglang:num_requests_total"))


@pytest.mark.parametrize("policy", ["round_robin"])
def test_a_replica_killed_under_load_is_routed_around_and_taken_back(soak_logs, policy):
    one, other = (Served(f"replica{i}", soak_logs) for i in (1, 2))
    port, admin = free_port(), free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(admin)]
    command += ["--worker-urls", one.url, other.url, "--policy", policy, "--health-check-endpoint", "/ready", "--health-check-interval-secs", "2"]
    command += ["--health-failure-threshold", "2", "--health-success-threshold", "1", "--health-check-timeout-secs", "2", "--worker-startup-timeout-secs", "240"]
    url = f"http://127.0.0.1:{port}"
    with one, other:
        known = {q: one.post("/v1/chat/completions", body(q)).json()["choices"][0]["message"]["content"] for q in QUESTIONS}
        with (soak_logs / "router.log").open("wb") as log:
            router = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        clients = None
        try:
            wait_for(lambda: requests.get(url + "/readiness", timeout=5).status_code == 200, 120)
            clients = Clients(url, known)
            time.sleep(8)
            before = [served_by(server) for server in (one, other)]
            killed = time.monotonic()
            victims = other.processes()
            for process in victims.values():
                process.send_signal(signal.SIGKILL)
            other.process.wait()
            time.sleep(15)
            routed = time.monotonic()
            time.sleep(8)
            again = time.monotonic()
            other.process = None
            other.started()
            back = time.monotonic()
            at_start = served_by(other)
            wait_for(lambda: served_by(other) > at_start + 5, 60)
            taken = time.monotonic()
            time.sleep(4)
        finally:
            if clients:
                clients.end()
            router.terminate()
            router.wait(30)
        phases = {
            "before the kill": clients.between(0, killed),
            "in the 15 s behind it": clients.between(killed, routed),
            "later, one replica": clients.between(routed, again),
            "while it starts again": clients.between(again, back),
            "taken back": clients.between(taken, float("inf")),
        }
        failed = [began - killed for began, _, got in clients.rows if got != "right"]
        slowest = max(ended - began for began, ended, _ in clients.rows)
        print(json.dumps({name: dict(count) for name, count in phases.items()}, indent=1))
        print(f"answered before the kill by each replica {before}; {len(failed)} of {len(clients.rows)} requests failed, sent {[round(s, 2) for s in failed[:20]]} s behind the kill")
        print(f"slowest answer {slowest:.1f} s; the restarted replica answered again {taken - back:.1f} s behind its start")
        total = Counter(got for _, _, got in clients.rows)
        assert not total["wrong"] and not total["hung"], total
        assert min(before) > 0, "one replica got nothing"
        # A client whose request was on the dead replica may be told so; nobody else.
        assert len(failed) <= 2 * CLIENTS, total
        assert set(phases["later, one replica"]) == {"right"} and set(phases["taken back"]) == {"right"}


def wait_for(what, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if what():
                return
        except requests.RequestException:
            pass
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds:.0f} s")
