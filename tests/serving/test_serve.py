"""`idlm serve` for real: from the command to an answer, and back to nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest

from .test_launch import free_port

START_SECONDS = 240


@pytest.fixture
def served(tmp_path):
    """The command after its ready line, with what it printed and how long the start took."""
    output = tmp_path / "output"
    with output.open("wb") as out:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "idlm_sglang.serving.cli", "serve"),
                *("--port", str(free_port()), "--log-file", str(tmp_path / "log")),
                "--sleep-on-idle",  # idle schedulers would spin on the cores that the tests share
            ],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while "idlm: ready after" not in output.read_text():
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        yield process, output
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_the_embedded_checkpoint_is_served_with_one_command_and_leaves_nothing_behind(served):
    process, output = served
    text = output.read_text()
    for part in ('as "idlm-demo"', "float32", "stride 4", "64 requests", "from the config", "/metrics", "idlm: ready after"):
        assert part in text
    line = text.splitlines()[-1].strip()
    answer = json.loads(subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout)
    print(line, answer["choices"][0]["message"]["content"], sep="\n")
    assert answer["model"] == "idlm-demo" and answer["usage"]["completion_tokens"] > 0
    metrics_url = re.search(r"http://\S+/metrics", text).group()
    metrics = urllib.request.urlopen(metrics_url).read().decode()
    assert re.search(r"^idlm:tokens_committed_total\S* [1-9]", metrics, re.MULTILINE)

    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3  # server, scheduler, detokenizer
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert output.read_text().splitlines()[-1] == "idlm: stopped (SIGTERM)"
    assert [child for child in children if child.is_running()] == []
