"""The live page on a real server: traces of answers, figures that move, the decode view in a browser."""

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from idlm_sglang.serving.live.tokens import origins
from tests.browser import chromium, problems, until
from tests.server.harness import chat, ids, prompts

STORY = "Count from 1 to 30."


def body_of(prompt, stride=None, trace=True, **params):
    custom = {"idlm_trace": trace} | ({} if stride is None else {"idlm_stride": stride})
    return {"text": prompt, "sampling_params": {"custom_params": custom, **params}}


def traced(server, calls, clients=12):
    with ThreadPoolExecutor(clients) as pool:
        replies = list(pool.map(lambda call: server.post("/generate", body_of(**call)), calls))
    assert all(reply.status_code == 200 for reply in replies), [reply.text for reply in replies if reply.status_code != 200][:1]
    return [reply.json() for reply in replies]


def holds(answer):
    """What is true of every trace: it is about each of the answer's tokens, and agrees with the answer's other figures."""
    meta, trace = answer["meta_info"], answer["meta_info"]["idlm_trace"]
    assert sum(tokens for tokens, *_ in trace) == meta["completion_tokens"] == len(ids(answer))
    assert trace[0] == [1, "prefill", 0, 0]
    decoded = [forward for forward in trace if forward[1] != "prefill"]
    assert len(decoded) == meta.get("spec_verify_ct", 0)
    assert sum(drafts for _, _, drafts, _ in decoded) == meta.get("spec_num_proposed_drafts", 0)
    assert sum(min(tokens, accepted) for tokens, _, _, accepted in decoded) == meta.get("spec_num_correct_drafts", 0)
    for tokens, kind, drafts, accepted in trace:
        assert accepted <= drafts and tokens <= accepted + 1 and (drafts > 0) == (kind in ("verify", "salvage"))
    assert sum(len(list(origins(forward))) for forward in trace) == len(ids(answer))
    return decoded


CALLS = [
    *({"prompt": p, "stride": 1 + i % 8, "temperature": i % 2, "max_new_tokens": 1 + 2 * i} for i, p in enumerate(prompts(24, seed=31))),
    *({"prompt": p, "stride": 8, "temperature": 0, "max_new_tokens": 60, "stop": ["e", "1"]} for p in prompts(12, seed=32)),
    *({"prompt": p, "temperature": 0, "max_new_tokens": 40, "stop_token_ids": [278, 17, 16]} for p in prompts(12, seed=33)),
    *({"prompt": chat(STORY), "temperature": 1, "presence_penalty": 1.0, "max_new_tokens": 30} for _ in range(3)),
    # Long: its last tokens come when no prefill is left to mix with.
    {"prompt": chat(STORY), "stride": 1, "temperature": 0, "max_new_tokens": 100, "ignore_eos": True},
    *({"prompt": chat(STORY), "temperature": 1, "regex": "[0-9]{3} (yes|no)", "max_new_tokens": 30} for _ in range(3)),
]


@pytest.mark.parametrize("server", ["isd", "isd_sync"])
def test_the_traced_tokens_are_the_answer_s_tokens(request, server):
    """Behind stops inside a run, limits, penalties, grammars, prefill chunks mixed with decoding."""
    answers = traced(request.getfixturevalue(server), CALLS)
    kinds = {kind for answer in answers for _, kind, *_ in (holds(answer), answer["meta_info"]["idlm_trace"])[1]}
    assert kinds >= {"prefill", "single", "verify", "salvage"}
    cut = sum(0 < forward[0] <= forward[3] for answer in answers for forward in answer["meta_info"]["idlm_trace"][-1:])
    print(f"{server}: {len(answers)} answers, {cut} of them cut inside an accepted run")
    assert cut > 3


def test_retracted_answers_are_traced_whole(isd_tight):
    calls = [{"prompt": p, "stride": 2 + i % 7, "temperature": 1, "max_new_tokens": 120, "logit_bias": {"2": -100}} for i, p in enumerate(prompts(36, seed=204))]
    answers = traced(isd_tight, calls, 24)
    for answer in answers:
        holds(answer)
    again = sum(answer["meta_info"]["num_retractions"] > 0 for answer in answers)
    print(f"{again} of {len(answers)} answers were retracted")
    assert again > 0


def test_a_trace_says_what_the_counters_say(isd):
    calls = [{"prompt": p, "stride": 4, "temperature": i % 2, "max_new_tokens": 64} for i, p in enumerate(prompts(24, seed=77))]
    before = isd.metrics()
    decoded = [forward for answer in traced(isd, calls) for forward in holds(answer)]
    delta = {k: v - before.get(k, 0.0) for k, v in isd.metrics().items()}
    for kind in ("verify", "salvage", "cold", "single"):
        assert delta[f'idlm:rounds_total{{kind="{kind}"}}'] == sum(forward[1] == kind for forward in decoded)
    for series, kind in (("drafts", "verify"), ("salvage", "salvage")):
        for j in (1, 2, 3):
            tried, stood = ([f for f in decoded if f[1] == kind and f[at] >= j] for at in (2, 3))
            assert delta[f'idlm:{series}_proposed_total{{position="{j}"}}'] == len(tried)
            assert delta[f'idlm:{series}_accepted_total{{position="{j}"}}'] == len(stood)
    phases = {phase: delta[f'idlm:step_seconds_total{{phase="{phase}"}}'] for phase in ("prepare", "forward", "choose", "process", "prefill")}
    print({phase: f"{1e3 * seconds / delta['idlm:forwards_total']:.2f} ms a step" for phase, seconds in phases.items()})
    # The forward blocks the host on a CPU.
    assert all(seconds > 0 for seconds in phases.values()) and phases["forward"] == max(phases[p] for p in ("prepare", "forward", "choose"))


@pytest.mark.parametrize("server", ["isd", "isd_rejection"])
def test_every_event_of_a_stream_has_the_trace_so_far(request, server):
    """Whole events and increments."""
    body = body_of(chat(STORY), 4, temperature=0, max_new_tokens=48) | {"stream": True}
    lines = [line for line in request.getfixturevalue(server).post("/generate", body, stream=True).iter_lines() if line.startswith(b"data: {")]
    events = [json.loads(line[6:])["meta_info"] for line in lines]
    assert len(events) > 5
    for meta, after in itertools.pairwise([*events, events[-1]]):
        assert sum(tokens for tokens, *_ in meta["idlm_trace"]) == meta["completion_tokens"]
        assert after["idlm_trace"][: len(meta["idlm_trace"])] == meta["idlm_trace"]


def test_nobody_gets_a_trace_who_did_not_ask(isd):
    for body in (body_of(chat(STORY), trace=False, max_new_tokens=8), {"text": chat(STORY), "sampling_params": {"max_new_tokens": 8}}):
        assert "idlm_trace" not in isd.post("/generate", body).json()["meta_info"]
    for wrong in (1, "yes", [True]):
        reply = isd.post("/generate", body_of(chat(STORY), trace=wrong, max_new_tokens=8))
        assert reply.status_code == 400 and f"custom_params.idlm_trace={wrong!r} is not valid; allowed: true, false" in reply.text


def decode(server, **body):
    """The tokens of the decode view, and its last event."""
    reply = server.post("/idlm/decode", body)
    assert reply.status_code == 200, reply.text
    *events, last = [json.loads(line) for line in reply.text.splitlines()]
    return [token for event in events for token in event["tokens"]], last["end"]


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1, "seed": 5}, {"temperature": 10, "seed": 6}])
@pytest.mark.parametrize("stride", [1, 4, 8])
@pytest.mark.parametrize("server", ["isd", "isd_rejection"])
def test_the_decode_view_shows_the_answer_token_by_token(request, server, stride, params):
    """At temperature 10 the answer is noise: characters cut, special tokens, bytes that are none."""
    server = request.getfixturevalue(server)
    tokens, end = decode(server, prompt=STORY, stride=stride, max_tokens=200, **params)
    sampling = {"temperature": params["temperature"], "max_new_tokens": 200} | ({"sampling_seed": params["seed"]} if "seed" in params else {})
    want = traced(server, [{"prompt": chat(STORY), "stride": stride, **sampling}])[0]
    decoded = holds(want)
    assert [token["id"] for token in tokens] == ids(want)
    assert "".join(token["text"] for token in tokens) + end["rest"] == want["text"]
    came = [pair for forward in want["meta_info"]["idlm_trace"] for pair in origins(forward)]
    assert [(token["origin"], token["position"]) for token in tokens] == came
    assert end["forwards"] == len(decoded) == max(token["step"] for token in tokens) and end["completion_tokens"] == len(tokens)
    assert end.get("seed") == params.get("seed")


def test_the_decode_view_takes_a_chat_or_raw_text(isd):
    raw, _ = decode(isd, prompt=chat("Was ist 3 + 4? 日本 🎉"), mode="raw", max_tokens=40)
    assert decode(isd, prompt="Was ist 3 + 4? 日本 🎉", mode="chat", max_tokens=40)[0] == raw != decode(isd, prompt="Was ist 3 + 4?", mode="raw", max_tokens=40)[0]


@pytest.mark.parametrize(
    "body, words",
    [
        (b"{", "the body is not JSON"),
        (b"[]", "the body is a list"),
        (b'{"prompt": "x", "stride": 17}', "stride=17 is not valid; allowed: an integer from 1 to 16"),
        (json.dumps({"prompt": "word " * 9000}).encode(), "longer than the model's context length"),
    ],
)
def test_a_question_that_cannot_be_served_is_one_line(isd, body, words):
    reply = requests.post(isd.url + "/idlm/decode", data=body, timeout=60)
    assert reply.status_code == 400 and words in reply.json()["error"]["message"], reply.text
    assert requests.get(isd.url + "/idlm/stats?since=soon", timeout=60).status_code == 400


def test_a_view_that_is_closed_ends_its_request(isd):
    before = isd.metrics()["idlm:tokens_committed_total"]
    with isd.post("/idlm/decode", {"prompt": "a", "mode": "raw", "temperature": 10, "seed": 110, "stride": 1, "max_tokens": 4000}, stream=True) as reply:
        assert next(reply.iter_lines())
    deadline = time.monotonic() + 30
    while sum(isd.idle_tokens()[1:]) and time.monotonic() < deadline:
        time.sleep(0.1)
    used = isd.metrics()["idlm:tokens_committed_total"] - before
    print(f"{used:.0f} of the answer's 1711 tokens decoded")
    assert sum(isd.idle_tokens()[1:]) == 0 and used < 1600


@pytest.fixture(scope="module")
def page(isd):
    with chromium() as driver:
        driver.get(isd.url + "/idlm")
        yield driver


def text_of(page, id_):
    return page.find_element("id", id_).text


def number(page, id_):
    try:
        return float(text_of(page, id_).split(" ")[0].replace(",", ""))
    except ValueError:
        return 0.0


def test_the_figures_move_while_requests_run(isd, page):
    until(page, lambda: text_of(page, "state-text") == "live", "the first figures")
    with ThreadPoolExecutor(6) as pool:
        calls = [{"prompt": p, "temperature": 0, "max_new_tokens": 150, "ignore_eos": True} for p in prompts(60, seed=5)]
        running = [pool.submit(isd.generate, **call) for call in calls]
        until(page, lambda: number(page, "rate") > 0 and number(page, "tpf") > 1, "tokens per second")
        for future in running:
            future.result()
    until(page, lambda: "%" in text_of(page, "acceptance") and "forward" in text_of(page, "phases"), "acceptance and phases")
    last = isd.live()
    assert last["tokens_committed"] == isd.metrics()["idlm:tokens_committed_total"]
    assert last["replicas"] == 1 and last["running"] == last["queued"] == 0
    assert text_of(page, "stride") == "4" and page.execute_script("return document.querySelectorAll('svg path.line').length") >= 4
    assert not problems(page)


def test_the_decode_view_colours_what_the_trace_says(isd, page):
    want = traced(isd, [{"prompt": chat(STORY), "stride": 4, "temperature": 0, "max_new_tokens": 256}])[0]
    came = [origin for forward in want["meta_info"]["idlm_trace"] for origin, _ in origins(forward)]
    prompt = page.find_element("id", "prompt")
    prompt.clear()
    page.execute_script("document.getElementById('pace').value = '0'")
    prompt.send_keys(STORY)
    from selenium.webdriver.common.keys import Keys

    prompt.send_keys(Keys.CONTROL, Keys.ENTER)
    verdict = until(page, lambda: page.find_element("id", "run").is_enabled() and text_of(page, "verdict"), "the answers")
    spans = page.execute_script("return [...document.querySelectorAll('#strided .answer span')].map((s) => [s.classList[1], s.textContent, getComputedStyle(s).borderBottomStyle])")
    assert [origin for origin, *_ in spans] == came
    assert "".join(text for _, text, _ in spans).removesuffix("<|im_end|>") == want["text"]
    steps = len(want["meta_info"]["idlm_trace"]) - 1
    assert verdict == f"the same {len(came)} tokens: {steps} steps in place of {len(came) - 1}"
    assert page.find_element("css selector", "#strided .count").text.startswith(f"{steps} steps, {len(came)} tokens")
    assert len(page.find_elements("css selector", "#strided .answer .begins")) == steps
    # A second cue beside the colour.
    styles = {origin: style for origin, _, style in spans}
    assert len(set(styles.values())) == len(styles) > 2, styles
    single = page.find_element("css selector", "#single .answer")
    single.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert "the step's only token (step 1)" in page.find_element("css selector", "#single .detail").text
    assert not problems(page)


def test_a_view_can_be_stopped(isd, page):
    page.execute_script("document.getElementById('pace').value = '3'")
    page.find_element("id", "run").click()
    until(page, lambda: page.find_elements("css selector", "#strided .answer span"), "the first token")
    page.find_element("id", "stop").click()
    until(page, lambda: page.find_element("id", "run").is_enabled(), "the end", 5)
    steps = len(page.find_elements("css selector", "#single .answer span"))
    assert text_of(page, "verdict") == "stopped" or steps > 20, "what had come by then is shown whole"
