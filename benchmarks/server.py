"""`idlm serve` of the embedded checkpoint for a benchmark: started on a free port, ended behind it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import requests

START_SECONDS = 240


@contextmanager
def running(flags: list[str], env: dict[str, str] | None = None) -> Iterator[str]:
    """The URL of a server that answers, with ``flags`` for `idlm serve` and ``env`` on top of the environment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "idlm_sglang.serving.cli", "serve", "--port", str(port), "--disable-radix-cache", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **(env or {})})
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if requests.get(url + "/health_generate", timeout=10).ok:
                    break
            except requests.RequestException:
                time.sleep(0.5)
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
        yield url
    finally:
        process.terminate()
        process.wait()
