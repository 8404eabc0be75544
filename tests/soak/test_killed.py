"""A scheduler killed in the middle of streams, a drain, and checkpoints that could run code."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from idlm_sglang.demo import CHECKPOINT_DIR
from tests.soak.served import Served

STREAM = {"text": "river stone", "sampling_params": {"temperature": 0, "max_new_tokens": 2500, "ignore_eos": True}, "stream": True}
STREAMS = 6
PATIENCE = 45.0  # seconds without a word, behind which a client counts as hung; SGLang waits 60 for core dumps


class Supervisor(threading.Thread):
    """What a container's restart policy does: the same command again whenever it ends."""

    def __init__(self, server: Served):
        super().__init__(daemon=True)
        self.server, self.codes, self.over = server, [], threading.Event()

    def run(self):
        while not self.over.is_set():
            with self.server.log.open("ab") as log:
                self.server.process = subprocess.Popen(self.server.command, env=self.server.env, stdout=log, stderr=log, start_new_session=True)
            code = self.server.process.wait()
            if not self.over.is_set():
                self.codes.append(code)

    def end(self):
        self.over.set()
        self.server.ended = False
        self.server.stop()


def follow(server: Served, first: threading.Event) -> tuple[str, float]:
    """How a stream ended for its client, and when; ``first`` is set at its first event."""
    try:
        with requests.post(server.url + "/generate", json=STREAM, stream=True, timeout=(10, PATIENCE)) as reply:
            last = b""
            for line in reply.iter_lines():
                if line.startswith(b"data: "):
                    first.set()
                    last = line
        finished = last.startswith(b"data: [DONE]")
        return ("finished" if finished else f"cut off: {last[:80]!r}"), time.monotonic()
    except requests.ReadTimeout:
        return "hung", time.monotonic()
    except requests.RequestException as error:
        return f"error: {type(error).__name__}", time.monotonic()
    finally:
        first.set()


@pytest.mark.parametrize("victim", ["scheduler", "detokenizer"])
def test_a_killed_process_ends_its_streams_and_the_supervisor_brings_the_server_back(soak_logs, victim):
    server = Served(f"killed-{victim}", soak_logs)
    supervisor = Supervisor(server)
    supervisor.start()
    try:
        assert server.ready() and server.answers()
        before = server.processes()
        started = [threading.Event() for _ in range(STREAMS)]
        with ThreadPoolExecutor(STREAMS) as clients:
            streams = [clients.submit(follow, server, event) for event in started]
            assert all(event.wait(60) for event in started)
            killed = time.monotonic()
            before[victim].send_signal(signal.SIGKILL)
            ends = [stream.result() for stream in streams]
        took = max(when for _, when in ends) - killed
        print(f"{victim} killed -9 under {STREAMS} streams: {sorted({how for how, _ in ends})}, the last client knew after {took:.1f} s")
        assert not any(how in ("hung", "finished") for how, _ in ends), ends
        deadline = time.monotonic() + 120
        while not supervisor.codes and time.monotonic() < deadline:
            time.sleep(0.1)
        assert supervisor.codes, "the server did not end when its worker was gone"
        ended = time.monotonic() - killed
        assert server.ready() and server.answers()
        print(f"exit code {supervisor.codes[0]} {ended:.1f} s behind the kill; answering again {time.monotonic() - killed:.1f} s behind it")
        assert supervisor.codes[0] != 0 and len(supervisor.codes) == 1
        left = [p for p in before.values() if p.is_running() and p.status() != "zombie"]
        assert not left, f"left behind: {left}"
    finally:
        supervisor.end()


def test_sigterm_lets_every_stream_finish(soak_logs):
    with Served("drained", soak_logs) as server:
        started = [threading.Event() for _ in range(STREAMS)]
        with ThreadPoolExecutor(STREAMS) as clients:
            streams = [clients.submit(follow, server, event) for event in started]
            assert all(event.wait(60) for event in started)
            told = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert requests.get(server.url + "/ready", timeout=10).status_code == 503
            ends = [stream.result() for stream in streams]
        code = server.process.wait(timeout=120)
        print(f"SIGTERM under {STREAMS} streams: {[how for how, _ in ends]}; the last finished after {max(w for _, w in ends) - told:.1f} s, exit code {code}")
        assert [how for how, _ in ends] == ["finished"] * STREAMS and code == 0
        assert any(when > told + 0.5 for _, when in ends), "all streams had finished before the signal"


CODE = "import pathlib\npathlib.Path({mark!r}).touch()\n"


@pytest.mark.parametrize("weights", ["pickled", "safetensors"])
def test_a_checkpoint_runs_no_code(soak_logs, tmp_path, weights):
    """A pickled checkpoint is refused; a pickle beside safetensors is not read; code named by auto_map is not run, though trusted."""
    import torch

    mark, model = tmp_path / "ran", tmp_path / "model"
    shutil.copytree(CHECKPOINT_DIR, model)

    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    torch.save({"model.embed_tokens.weight": Runs()}, model / "pytorch_model.bin")
    (model / "modeling_evil.py").write_text(CODE.format(mark=str(mark)) + "class Config: ...\nclass Model: ...\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["SDARForCausalLM"], "model_type": "sdar"}
    config["auto_map"] = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model", "AutoModel": "modeling_evil.Model"}
    (model / "config.json").write_text(json.dumps(config))
    if weights == "pickled":
        (model / "model.safetensors").unlink()
    server = Served(f"code-{weights}", soak_logs, "--trust-remote-code", "--dtype", "float32", model=str(model))
    if weights == "pickled":
        done = subprocess.run(server.command, env=server.env, capture_output=True, text=True, timeout=300)
        print(done.stderr[-600:])
        assert done.returncode != 0
    else:
        with server:
            assert server.answers()
    assert not mark.exists(), "the checkpoint's code ran"
