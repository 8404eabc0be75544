"""The servers of the arms: started one after the other, asked what they are, ended together."""

import os
import signal
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from idlm_sglang.bench.arms import URL, Arm, command
from idlm_sglang.serving.ports import free_port
from idlm_sglang.serving.server import end_with_parent

_ORDERLY = 20.0  # seconds for an orderly stop before what is left is killed


class BenchError(SystemExit, RuntimeError):
    """The comparison cannot go on, or would not be fair: one line that says why, and exit code 1."""

    def __init__(self, message: str):
        super().__init__(f"idlm: {message}")


@dataclass
class Served:
    """An arm that answers at ``url``; ``command`` is None where somebody else started it."""

    arm: Arm
    url: str
    command: list[str] | None
    environ: dict[str, str]

    def get(self, path: str) -> dict:
        """A JSON page of the server's. Raises :class:`BenchError`."""
        try:
            reply = requests.get(self.url + path, headers=authorization(), timeout=60)
            reply.raise_for_status()
            return reply.json()
        except (requests.RequestException, ValueError) as error:
            raise BenchError(f"arm {self.arm.name} does not answer {path}: {_first_line(error)}") from None

    def metrics(self) -> str:
        """``/metrics`` as text, empty where the server publishes none."""
        try:
            reply = requests.get(self.url + "/metrics", headers=authorization(), timeout=60)
        except requests.RequestException as error:
            raise BenchError(f"arm {self.arm.name} does not answer /metrics: {_first_line(error)}") from None
        return reply.text if reply.ok else ""

    def running_limit(self) -> int:
        """Requests that the server decodes at a time, all data-parallel ranks together."""
        info = self.get("/server_info")
        per_rank = (info.get("internal_states") or [{}])[0].get("effective_max_running_requests_per_dp")
        if per_rank is None:
            raise BenchError(f"arm {self.arm.name} does not say how many requests it decodes at a time (/server_info); is it SGLang?")
        return int(per_rank) * int(info.get("dp_size") or 1)


def check_limit(one: Served, concurrency: int) -> None:
    """Raise :class:`BenchError` for an arm that would queue at this concurrency, where another would not."""
    limit = one.running_limit()
    if limit < concurrency:
        raise BenchError(f"arm {one.arm.name} decodes at most {limit} requests at a time, below the concurrency {concurrency}; raise its --max-running-requests")


class Servers(ExitStack):
    """Starts arms; what it started ends with it.

    An idle one sleeps (``--sleep-on-idle``) and does not take the cores from the one that is timed. With ``alone`` at most one that
    was started is up at a time: what :meth:`served` starts ends the one before.
    """

    def __init__(self, model: Path | str, embedded: bool, common: tuple[str, ...], scratch: Path, logs: Path, start_seconds: float, alone: bool):
        super().__init__()
        self._alone, self._up = alone, {}
        self._model, self._embedded, self._common = model, embedded, common
        self._scratch, self._logs, self._start_seconds = scratch, logs, start_seconds

    def served(self, arm: Arm) -> Served:
        """The arm, started if it is not up. Raises :class:`BenchError`."""
        if arm.name not in self._up:
            if self._alone:
                self.close()
                self._up.clear()
            self._up[arm.name] = self.start(arm)
        return self._up[arm.name]

    def start(self, arm: Arm) -> Served:
        """One more server for the arm, once it answers. Raises :class:`BenchError` with the last lines of its log."""
        if arm.kind == URL:
            served = Served(arm, arm.url, None, {})
            served.get("/server_info")
            return served
        port = free_port()
        words, environ = command(arm, self._model, self._embedded, self._common, port, self._scratch)
        log = self._logs / f"{arm.name.replace('/', '_')}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **environ},
                # Ctrl-C is for us; the servers are ended in order behind it.
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        self.callback(_end, process)
        served = Served(arm, f"http://127.0.0.1:{port}", words, environ)
        deadline = time.monotonic() + self._start_seconds
        while not _answers(served.url):
            if process.poll() is not None or time.monotonic() > deadline:
                how = f"ended with exit code {process.returncode}" if process.returncode is not None else f"did not answer within {self._start_seconds:.0f} s"
                raise BenchError(f"arm {arm.name} {how}: {_reason(log)}; its log is {log}")
            time.sleep(0.5)
        return served


def _answers(url: str) -> bool:
    try:
        return requests.get(url + "/health_generate", headers=authorization(), timeout=10).ok
    except requests.RequestException:
        return False


def authorization() -> dict[str, str]:
    """The header with the key of `--api-key`, empty without one."""
    # The variables that SGLang's load generator takes its key from.
    key = os.environ.get("OPENAI_API_KEY") or os.environ.get("API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _end(process: subprocess.Popen) -> None:
    """SIGTERM, and after a while SIGKILL for what is left of the tree."""
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_ORDERLY)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for left in psutil.wait_procs(tree, timeout=1)[1]:
        try:
            left.kill()
        except psutil.NoSuchProcess:
            pass


def _reason(log: Path) -> str:
    """The line of a log that says most: our own refusal, else the last error, else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("idlm: ")]
    errors = [line for line in lines if "Error" in line]
    return (own or errors or lines or ["nothing was logged"])[-1].removeprefix("idlm: ")[:300]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
