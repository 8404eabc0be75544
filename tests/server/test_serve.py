"""`idlm serve` for real: from the command to an answer, and back to nothing."""

import json
import os
import re
import signal
import subprocess
import time
import urllib.request

import psutil
import pytest
import requests

from tests.server import fleet
from tests.server.harness import IdlmServe

KEY = IdlmServe.KEY


def the_live_page_asks_for_the_key(url):
    """As a bearer token, or as the password that a browser asks for; no data leaves without it."""

    def status(path, method="GET", **named):
        reply = requests.request(method, url + path, json={"prompt": "x", "max_tokens": 2} if method == "POST" else None, timeout=60, **named)
        return reply.status_code, "tokens" in reply.text

    routes = (("", "GET"), ("/stats", "GET"), ("/decode", "POST"))
    for path, method in routes:
        for wrong in ({}, {"auth": ("idlm", KEY + "x")}, {"auth": (KEY, "")}, {"headers": {"Authorization": f"Bearer {KEY}x"}}, {"headers": {"Authorization": "Basic !"}}):
            assert status(path, method, **wrong) == (401, False), (path, wrong)
        for right in ({"auth": ("anyone", KEY)}, {"headers": {"Authorization": f"Bearer {KEY}"}}):
            assert status(path, method, **right) == (200, True), (path, right)
        assert status(path, method, auth=("", KEY), headers={"Sec-Fetch-Site": "cross-site"}) == (403, False)
    assert requests.get(url, timeout=60).headers["WWW-Authenticate"].startswith("Basic")
    assert requests.post(url.removesuffix("/idlm") + "/generate", json={"text": "x"}, auth=("", KEY), timeout=60).status_code == 401, "SGLang's routes are as they were"


def test_the_embedded_checkpoint_is_served_with_one_command_and_leaves_nothing_behind(idlm_serve, request):
    """The last test of this server."""
    if not fleet.of(request.config).is_last("idlm_serve", request.node):
        pytest.skip("run in an order in which other tests of its server come behind it")
    process, output = idlm_serve.process, idlm_serve.log
    deadline = time.monotonic() + 60
    while "idlm: ready after" not in (text := output.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, text
        time.sleep(0.2)
    for part in ('as "idlm-demo"', "float32", "stride auto", "64 requests", "from the config", "/metrics", "idlm: ready after"):
        assert part in text
    line = text.splitlines()[-1].strip()
    answer = json.loads(subprocess.run(line, shell=True, capture_output=True, text=True, check=True, env=os.environ | {"API_KEY": KEY}).stdout)
    print(line, answer["choices"][0]["message"]["content"], sep="\n")
    assert answer["model"] == "idlm-demo" and answer["usage"]["completion_tokens"] > 0
    metrics_url = re.search(r"http://\S+/metrics", text).group()
    metrics = urllib.request.urlopen(metrics_url).read().decode()
    assert re.search(r"^idlm:tokens_committed_total\S* [1-9]", metrics, re.MULTILINE)

    the_live_page_asks_for_the_key(re.search(r"http://\S+/idlm$", text, re.MULTILINE).group())
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3  # server, scheduler, detokenizer
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert output.read_text().splitlines()[-1] == "idlm: stopped (SIGTERM)"
    assert [child for child in children if child.is_running()] == []
