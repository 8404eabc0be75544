"""`idlm serve` of the embedded checkpoint for a benchmark: started on a free port, ended behind it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from idlm_sglang.serving.ports import free_port

START_SECONDS = 240


@contextmanager
def running(flags: list[str], env: dict[str, str] | None = None, log: Path | None = None, radix: bool = False) -> Iterator[str]:
    """The URL of a server that answers, with ``flags`` for `idlm serve` and ``env`` on top of the environment; its log
    goes to ``log``, and it caches prefixes if ``radix``."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "idlm_sglang.serving.cli", "serve", "--port", str(port), *([] if radix else ["--disable-radix-cache"]), *flags]
    with open(log or os.devnull, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **(env or {})})
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if requests.get(url + "/health_generate", timeout=10).ok:
                    break
            except requests.RequestException:
                time.sleep(0.5)
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start: {' '.join(command)}" + (f"\n{last_words(log)}" if log else ""))
        yield url
    finally:
        process.terminate()
        process.wait()


def last_words(log: Path) -> str:
    """What a server that ended said about itself, else the end of its log."""
    lines = log.read_text(errors="replace").splitlines()
    own = [line for line in lines if line.startswith("idlm: ") and "the server ended" not in line]
    failed = [line for line in lines if "Error" in line]
    return (own or failed or lines or ["none"])[-1]
