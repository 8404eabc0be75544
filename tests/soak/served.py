"""`idlm serve` as it is run in production, its processes looked at from outside."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import requests

from tests.server.harness import CHECKPOINT, Server

STOP_SECONDS = 60
MOST_BYTES = 6 * 2**30  # of data of each process; the scheduler has 3.9 GB at rest
ROLES = {"sglang::scheduler": "scheduler", "sglang::detokenizer": "detokenizer", "idlm_sglang.serving.server": "http", "idlm_sglang.serving.cli": "launcher"}


class Served(Server):
    """``idlm serve`` on 127.0.0.1, with the embedded checkpoint unless told otherwise, as a context manager."""

    def __init__(
        self, name: str, logs: Path, *flags: str, env: dict | None = None, model: str = CHECKPOINT, key: str | None = None, port: int | None = None,
        most_bytes: int = MOST_BYTES,
    ):  # fmt: skip
        super().__init__(name, model, logs, env=env)
        # A server reads custom logit processors by the name of the module that they are from: one of these tests.
        self.env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), self.env.get("PYTHONPATH")]))
        self.port = port or self.port
        self.url = f"http://127.0.0.1:{self.port}"
        self.server_log = logs / f"{name}.server.log"
        words = ["serve", model, "--port", str(self.port), "--sleep-on-idle", "--log-file", str(self.server_log), *flags]
        # A request that makes a process take all memory shall end that process, and not this machine.
        self.command = ["prlimit", f"--data={most_bytes}", sys.executable, "-m", "idlm_sglang.serving.cli", *words, *(["--api-key", key] if key else [])]
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def post(self, path: str, body, **kwargs) -> requests.Response:
        kwargs.setdefault("timeout", 300)
        return requests.post(self.url + path, json=body, headers=self.headers, **kwargs)

    def get(self, path: str, **kwargs) -> requests.Response:
        return requests.get(self.url + path, headers=self.headers, timeout=60, **kwargs)

    def processes(self) -> dict[str, psutil.Process]:
        """The server's processes by role."""
        found = {}
        top = psutil.Process(self.process.pid)
        for process in [top, *top.children(recursive=True)]:
            words = " ".join(process.cmdline())
            for mark, role in ROLES.items():
                if mark in words and role not in found:
                    found[role] = process
        return found

    def stop(self):
        if self.ended:
            return
        self.ended = True
        try:
            everything = [*psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            everything = []
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for process in everything:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass

    def ready(self, seconds: float = 240) -> bool:
        """Whether ``/ready`` says 200 within ``seconds``."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if requests.get(self.url + "/ready", timeout=5).status_code == 200:
                    return True
            except requests.RequestException:
                pass
            time.sleep(0.25)
        return False

    def answers(self) -> bool:
        """Whether an ordinary chat request is answered."""
        body = {"model": "m", "messages": [{"role": "user", "content": "What is I-DLM?"}], "max_tokens": 6, "temperature": 0}
        try:
            reply = self.post("/v1/chat/completions", body, timeout=60)
            return reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] > 0
        except (requests.RequestException, ValueError, KeyError):
            return False


class Stock(Served):
    """Stock SGLang in its place: the CPU platform alone, and the weights, copied to ``directory``, under the name that SGLang serves them by."""

    def __init__(self, logs: Path, directory: Path, *flags: str, key: str | None = None, env: dict | None = None):
        super().__init__("stock", logs, key=key, env={"SGLANG_PLUGINS": "idlm_cpu", **(env or {})})
        model = shutil.copytree(CHECKPOINT, directory / "model")
        config = json.loads((model / "config.json").read_text()) | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
        (model / "config.json").write_text(json.dumps(config))
        self.command = [*self.command[:3], "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(self.port), "--dtype", "float32"]
        self.command += ["--sleep-on-idle", *(["--api-key", key] if key else []), *flags]


def number(name: str, default: int) -> int:
    """A whole number from the environment."""
    return int(os.environ.get(name) or default)
