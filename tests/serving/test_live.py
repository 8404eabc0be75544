"""The live page without a server behind it: who may see it, what it adds up, what it makes of hostile answers."""

import asyncio
import base64
import hashlib
import http.server
import json
import re
import threading

import pytest
from tokenizers import Tokenizer

from idlm_sglang.demo import CHECKPOINT_DIR
from idlm_sglang.serving.live.ask import Mistake, asked
from idlm_sglang.serving.live.gate import Gate
from idlm_sglang.serving.live.history import History, sample
from idlm_sglang.serving.live.page import content, policy
from idlm_sglang.serving.live.tokens import Pieces, origins
from tests.browser import chromium, problems, until


def through_the_gate(path, headers=(), status=200, method="GET", root_path=""):
    """What SGLang's app behind the gate was asked (None: nothing), and what the client was answered."""
    seen, sent = [], []

    async def app(scope, receive, send):
        seen.append(dict(scope["headers"]))
        await send({"type": "http.response.start", "status": status, "headers": []})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "root_path": root_path, "headers": [(k.encode(), v.encode()) for k, v in headers]}
    asyncio.run(Gate(app, first=lambda: None)(scope, None, send))
    return (seen or [None])[0], sent[0]["status"], dict(sent[0]["headers"])


def basic(user_and_key):
    return [("authorization", "Basic " + base64.b64encode(user_and_key.encode()).decode())]


def test_a_browser_s_password_becomes_the_bearer_key_on_the_page_s_paths_alone():
    for path in ("/idlm", "/idlm/stats", "/idlm/decode"):
        assert through_the_gate(path, basic("me:se:same"))[0][b"authorization"] == b"Bearer se:same"
    assert through_the_gate("/idlm", [("authorization", "Bearer k")])[0][b"authorization"] == b"Bearer k"
    for broken in ("Basic", "Basic !!", "Basic bm9jb2xvbg==", "Digest x"):
        assert through_the_gate("/idlm", [("authorization", broken)])[0][b"authorization"] == broken.encode()
    for other in ("/generate", "/idlmx", "/v1/idlm"):
        assert through_the_gate(other, basic(":k"))[0][b"authorization"].startswith(b"Basic ")
    assert through_the_gate("/at/idlm/stats", basic(":k"), root_path="/at")[0][b"authorization"] == b"Bearer k"
    # SGLang compares ASCII: other characters make a wrong key.
    assert through_the_gate("/idlm", basic(":schlüssel"))[0][b"authorization"].isascii()


def test_a_browser_is_asked_for_the_key_on_the_page_s_paths_alone():
    assert through_the_gate("/idlm", status=401)[2][b"www-authenticate"].startswith(b"Basic ")
    assert b"www-authenticate" not in through_the_gate("/generate", status=401)[2]


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_websites_are_refused_whatever_key_the_browser_adds(site):
    headers = [("sec-fetch-site", site), *basic(":k")]
    for path, method in (("/idlm/stats", "GET"), ("/idlm/decode", "POST"), ("/idlm", "GET")):
        seen, status, _ = through_the_gate(path, headers, method=method)
        assert seen is None and status == 403
    visit = [*headers, ("sec-fetch-mode", "navigate")]
    assert through_the_gate("/idlm", visit)[1] == 200 and through_the_gate("/idlm/stats", visit)[1] == 403
    for own in ("same-origin", "none"):
        assert through_the_gate("/idlm/stats", [("sec-fetch-site", own)])[1] == 200


def test_the_policy_allows_the_page_s_own_style_and_script_and_nothing_else():
    page = content()
    for tag in ("style", "script"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        assert len(inside) > 1000
        assert f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'" in policy(page)
    assert "unsafe" not in policy(page) and policy(page).startswith("default-src 'none'")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|innerHTML|insertAdjacentHTML|document\.write|eval\(|Storage", page)
    assert not re.search(r"\s(style|on\w+)=", page), "the policy forbids such attributes"


def state(tokens, stride=4, drafts=3):
    by_position = {f"{kind}_{what}": [tokens] * drafts for kind in ("drafts", "salvage") for what in ("proposed", "accepted")}
    rounds, seconds = dict.fromkeys(("verify", "single"), tokens), {"forward": tokens / 2}
    return {"idlm": {"tokens_committed": tokens, "forwards": 1, "timed_steps": 1, "running": 2, "queued": 1, "rounds": rounds, "step_seconds": seconds,
                     "stride": stride, "max_stride": 4, "auto": False, "steps_by_stride": {str(stride): tokens}, **by_position}}


def test_replicas_are_added_up():
    one = sample([state(3), state(4, stride=2), {}], 10.0)
    assert one["replicas"] == 2 and one["tokens_committed"] == 7 and one["running"] == 4 and one["queued"] == 2
    assert one["drafts_accepted"] == [7, 7, 7] and one["rounds"] == {"verify": 7, "single": 7} and one["step_seconds"] == {"forward": 3.5}
    assert one["strides"] == [2, 4] and one["steps_by_stride"] == {"4": 3, "2": 4}


def test_the_history_is_read_by_itself_and_more_often_while_somebody_looks(monkeypatch):
    monkeypatch.setattr("idlm_sglang.serving.live.history._WATCHED", 0.01)
    reads = []

    async def read():
        reads.append(len(reads))
        if len(reads) == 2:
            raise RuntimeError("a read may fail")
        return [state(len(reads))]

    async def run():
        history = History(read)
        history.start()
        history.start()
        await asyncio.sleep(0.1)
        assert len(reads) == 1, "nobody looks: the next one is seconds away"
        assert len(history.since(0)) == 1
        while len(reads) < 6:
            await asyncio.sleep(0.01)
        found = history.since(0)
        assert [one["tokens_committed"] for one in found][:3] == [1, 3, 4]
        assert history.since(found[-2]["time"]) == found[-1:]

    asyncio.run(asyncio.wait_for(run(), 20))


def test_the_history_forgets():
    history = History(None)
    for second in range(1000):
        history.keep(sample([state(second)], float(second)))
    assert [one["time"] for one in history.since(0)] == [float(t) for t in range(699, 1000)]


@pytest.mark.parametrize(
    "body, words",
    [
        ([], "the body is a list"),
        ({}, "prompt is missing"),
        ({"prompt": ""}, "prompt is missing"),
        ({"prompt": ["x"]}, "prompt is missing"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": "x", "mode": "loud"}, "mode='loud' is not known; allowed: chat, raw"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens=0 is not valid; allowed: an integer from 1 to 8192"),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens='5'"),
        ({"prompt": "x", "stride": 5}, "stride=5 is not valid; allowed: an integer from 1 to 4"),
        ({"prompt": "x", "stride": True}, "stride=True"),
        ({"prompt": "x", "seed": -1}, "seed=-1"),
        ({"prompt": "x", "seed": 2**60}, "seed="),
        ({"prompt": "x", "temperature": float("nan")}, "temperature=nan"),
        ({"prompt": "x", "temperature": "hot"}, "temperature='hot'"),
        ({"prompt": "x", "custom_logit_processor": "..."}, "'custom_logit_processor' is not known"),
    ],
)
def test_a_bad_question_is_one_line(body, words):
    with pytest.raises(Mistake) as mistake:
        asked(body, 4)
    assert words in str(mistake.value) and "\n" not in str(mistake.value)


def test_how_the_tokens_of_a_forward_came():
    assert list(origins([4, "verify", 3, 3])) == [("accepted", 1), ("accepted", 2), ("accepted", 3), ("bonus", 4)]
    assert list(origins([3, "salvage", 3, 2])) == [("salvaged", 1), ("salvaged", 2), ("corrected", 3)]
    assert list(origins([2, "verify", 3, 3])) == [("accepted", 1), ("accepted", 2)], "an end cut it"
    assert list(origins([0, "verify", 3, 1])) == []
    assert [list(origins([1, kind, 0, 0])) for kind in ("prefill", "single", "cold")] == [[("first", 1)], [("single", 1)], [("cold", 1)]]


@pytest.mark.parametrize("text", ["Grüße, 日本語 und 🎉👩‍👩‍👧!\n\n\tنص", "plain words", " leading", "\ufffd\ufffd odd", "🎉" * 40])
def test_the_pieces_of_a_text_are_the_text(text):
    tokenizer = Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    whole = tokenizer.decode(ids)
    for one_by_one in (True, False):
        pieces = Pieces(tokenizer)
        found = [pieces.add([i])[0] for i in ids] if one_by_one else pieces.add(ids)
        assert "".join(found) + pieces.rest() == whole
        # A character of several tokens comes whole.
        assert not any("\ufffd" in piece for piece in found) or "\ufffd" in text
    cut = Pieces(tokenizer)
    assert "".join(cut.add(ids[:-1])) + cut.rest() == tokenizer.decode(ids[:-1])


class Hostile(http.server.BaseHTTPRequestHandler):
    """The page from a server whose model says what it likes: what it answers stands in ``lines``."""

    SCRIPT = "<script>window.taken = 1</script><img src=x onerror='window.taken = 2'>"
    status, lines = 200, ()

    def do_GET(self):
        page, stats = content(), {"model": self.SCRIPT, "started": 1, "kept": 300, "max_stride": 4, "samples": []}
        body, kind = (page, "text/html") if self.path == "/idlm" else (json.dumps(stats), "application/json")
        self.answer(200, kind, body, [("Content-Security-Policy", policy(page))])

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(type(self).status, "application/x-ndjson", "".join(json.dumps(line) + "\n" for line in type(self).lines), [])

    def answer(self, status, kind, body, headers):
        self.send_response(status)
        for name, value in [("Content-Type", kind + "; charset=utf-8"), ("Content-Length", str(len(body.encode()))), *headers]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def page():
    """The page in a browser, and the server's class to say what it answers."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server, chromium(width=500) as driver:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        driver.get(f"http://127.0.0.1:{server.server_port}/idlm")
        yield driver
        server.shutdown()


def verdict_of(page, status, lines):
    from selenium.webdriver.common.by import By

    Hostile.status, Hostile.lines = status, lines
    until(page, lambda: page.find_element(By.ID, "run").is_enabled(), "the last answer is over")
    page.execute_script("document.getElementById('pace').value = '0'")
    page.find_element(By.ID, "run").click()
    text = until(page, lambda: page.find_element(By.ID, "run").is_enabled() and page.find_element(By.ID, "verdict").text, "a verdict")
    return text, page.find_element(By.CSS_SELECTOR, "#strided .answer").get_attribute("textContent")


def token(text, **more):
    return {"id": 7, "text": text, "origin": "bonus", "position": 1, "step": 1, **more}


END = {"end": {"finish_reason": "stop", "completion_tokens": 2, "forwards": 1, "rest": "", "seed": None}}


def test_markup_in_an_answer_stays_text(page):
    hostile = Hostile.SCRIPT
    text, shown = verdict_of(page, 200, [{"tokens": [token(hostile), token("", special=hostile)]}, END])
    assert shown == hostile * 2 and text.startswith("the same 2 tokens")
    assert page.find_element("id", "model").text == hostile
    assert page.execute_script("return [window.taken, document.querySelectorAll('main script, main img, header img').length]") == [None, 0]
    assert not problems(page)


@pytest.mark.parametrize(
    "status, lines, words",
    [
        (400, [{"error": {"message": "stride=9 is not valid; allowed: 1"}}], "stride=9 is not valid; allowed: 1"),
        (401, [{"error": "Unauthorized"}], "the API key is refused"),
        (502, ["<html>"], "HTTP 502"),
        (200, [{"tokens": [token("cut")]}], "the answer was cut off"),
        (200, [{"tokens": [token("so far")]}, {"error": {"message": "the grammar failed"}}], "the grammar failed"),
        (200, [{"tokens": [token("so far")]}, {"end": {**END["end"], "message": "aborted by the server"}}], "aborted by the server"),
    ],
)
def test_an_error_is_shown_as_its_line(page, status, lines, words):
    text, _ = verdict_of(page, status, lines)
    assert words in text and page.find_element("id", "verdict").get_attribute("class") == "bad"


def test_a_narrow_screen_shows_all_of_the_page(page):
    verdict_of(page, 200, [{"tokens": [token("w" * 4000)]}, END])
    for width in (320, 500):
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False})
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
