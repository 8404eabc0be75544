"""`idlm parity`: AR and ISD are at parity; a server that is not AR is found, and what is different about it is named."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from idlm_sglang.serving import cli
from tests.server.parity.cases import token

FEW = ["--samples", "80", "--sampled-prompts", "2", "--speed-rounds", "2", "--concurrency", "8"]


@pytest.fixture
def changed(isd):
    """A server that answers other than was asked: ``change`` is applied to each body on its way to ISD."""
    change = {}

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_GET(self):
            self.forward(requests.get(isd.url + self.path, timeout=60))

        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                content = json.dumps({**json.loads(content), **change}).encode()
            except ValueError:
                pass
            self.forward(requests.post(isd.url + self.path, data=content, headers={"Content-Type": "application/json"}, timeout=60))

        def forward(self, reply):
            self.send_response(reply.status_code)
            self.send_header("Content-Type", reply.headers["Content-Type"])
            self.end_headers()
            self.wfile.write(reply.content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", change
    server.shutdown()


def compared(capsys, baseline, candidate, *words):
    code = cli.main(["parity", "--baseline", baseline, "--candidate", candidate, *FEW, *words])
    said = capsys.readouterr()
    print(said.out, said.err)
    return code, said.out


def test_ar_and_isd_are_at_parity(ar, isd, tmp_path, capsys):
    code, out = compared(capsys, ar.url, isd.url, "--out", str(tmp_path))
    assert code == 0 and out.splitlines()[-1] == "idlm: parity"
    assert "seeded answers are compared token by token" in out.lower() and "0 different" in out
    right = re.search(r"(\S+) % right on the baseline, (\S+) % on the candidate, of 6", out)
    assert right and right[1] == right[2] and float(right[1]) > 50
    found = json.loads((tmp_path / "report.json").read_text())
    words = {each["name"]: each["passed"] for each in found["findings"]}
    assert words == {"greedy": True, "seeded": True, "sampled": True, "score": True, "fields": True, "errors": True, "speed": None}
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "http-equiv" not in page and "<script" not in page and "<link" not in page
    assert "| greedy | ok |" in (tmp_path / "report.md").read_text()


def test_a_biased_candidate_is_found_with_the_place_and_the_margin(ar, changed, capsys):
    url, change = changed
    change["logit_bias"] = {str(token(" the")): 4.0, str(token(" is")): 4.0}
    code, out = compared(capsys, ar.url, url, "--samples", "0", "--speed-rounds", "0")
    assert code == 1 and "greedy   FAIL" in out and "margin" in out and "idlm: not at parity: greedy" in out
    code, out = compared(capsys, ar.url, url, "--samples", "0", "--speed-rounds", "0", "--tie-margin", "100")
    assert "greedy   ok" in out and "part at near-ties" in out


def test_a_candidate_of_another_temperature_is_found_by_its_distribution(ar, changed, tmp_path, capsys):
    """Greedy answers are the same; seeded ones are compared by distribution, as with a baseline without the plugin."""
    url, change = changed
    file = tmp_path / "requests.jsonl"
    file.write_text('{"path": "/v1/completions", "request": {"prompt": "<|im_start|>user\\nMy name is", "temperature": 1.0}}\n')
    more = ["--prompts", str(file), "--samples", "200", "--speed-rounds", "0"]
    assert compared(capsys, ar.url, url, *more)[0] == 0
    change["temperature"] = 2.0
    code, out = compared(capsys, ar.url, url, *more)
    assert code == 1 and "idlm: not at parity: sampled" in out


def test_a_candidate_that_is_too_slow_is_refused(ar, isd, capsys):
    code, out = compared(capsys, ar.url, isd.url, "--samples", "0", "--limit", "4", "--min-speed-ratio", "50")
    assert code == 1 and "idlm: not at parity: speed" in out
