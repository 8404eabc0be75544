"""What is sent to an endpoint and what is made of its answers; the endpoint here is a small HTTP server that fails on demand."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from idlm_sglang.quality.client import ChatModel, read_answer
from idlm_sglang.quality.endpoint import Endpoint, EndpointError

from .conftest import plan


@pytest.fixture
def server():
    """Answers every chat with ``reply`` (a function of the body: status and JSON) and keeps the bodies."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.bodies.append(body)
            status, said = found.reply(body)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = SimpleNamespace(url=f"http://127.0.0.1:{listening.server_port}", bodies=[], reply=lambda body: (200, completion("fine")))
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield found
    listening.shutdown()
    listening.server_close()


def completion(content, finish="stop", **message) -> dict:
    message = {"role": "assistant", "content": content} | message
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}}  # fmt: skip


def ask(server, *words, prompts=("one", "two"), settings=None, log=None, arm="a", turns=()):
    """The answers to one user turn each, through lm-eval's interface; bodies by their question."""
    made = plan("--suite", "demo", *words, arms=[f"{arm}={server.url}", f"b{arm}={server.url}"])
    model = ChatModel(Endpoint(made.arms[0], made), "m", made, log)
    requests = [SimpleNamespace(args=(model.apply_chat_template([{"role": "user", "content": text}, *turns]), settings or {})) for text in prompts]
    answers = model.generate_until(requests)
    model.close()
    return answers, sorted(server.bodies, key=lambda body: json.dumps(body, sort_keys=True)), model


def test_every_question_and_every_repeat_has_a_seed_of_its_own_and_every_arm_the_same(server):
    _, bodies, _ = ask(server, prompts=["one", "two", "one"], arm="a")
    first = [(body["messages"][0]["content"], body["seed"]) for body in bodies]
    assert len({seed for _, seed in first}) == 3
    server.bodies.clear()
    _, bodies, _ = ask(server, prompts=["one", "two", "one"], arm="other")
    assert sorted((body["messages"][0]["content"], body["seed"]) for body in bodies) == sorted(first)
    server.bodies.clear()
    _, bodies, _ = ask(server, "--seed", "1", prompts=["one", "two", "one"])
    assert not {seed for _, seed in first} & {body["seed"] for body in bodies}


def test_sampling_and_further_fields_are_in_the_body_as_asked(server):
    settings = {"until": ["Q:"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 7}
    _, (body,), _ = ask(server, "--thinking", "model", "--extra", '{"custom_params": {"idlm_stride": 2}}', prompts=["one"], settings=settings)
    assert {k: body[k] for k in ("temperature", "top_p", "top_k", "max_tokens")} == {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "max_tokens": 256}
    assert body["custom_params"] == {"idlm_stride": 2} and not {"until", "do_sample", "max_gen_toks", "chat_template_kwargs"} & set(body)


@pytest.mark.parametrize(("thinking", "sent"), [("on", False), ("model", False), ("off", True)])
def test_stop_strings_of_a_task_cut_the_answer_and_never_the_thinking(thinking, sent, server):
    server.reply = lambda body: (200, completion("<think>\nQ: is it?</think>\n\nYes.\nQ: more"))
    (answer,), (body,), _ = ask(server, "--thinking", thinking, prompts=["one"], settings={"until": ["Q:"]})
    assert answer == "Yes.\n"
    assert ("stop" in body) == sent
    assert body.get("chat_template_kwargs") == {"on": {"enable_thinking": True}, "off": {"enable_thinking": False}}.get(thinking)


def test_an_answer_that_the_task_begins_is_continued_and_not_taken_for_a_question(server):
    _, (body,), _ = ask(server, prompts=["one"], turns=[{"role": "assistant", "content": "The answer is"}])
    assert body["continue_final_message"] is True and body["messages"][-1]["role"] == "assistant"


@pytest.mark.parametrize(
    ("reply", "thinking", "final"),
    [
        (completion("<think>a</think>\n\nb"), False, "b"),
        (completion("b", reasoning_content="a"), True, "b"),
        (completion(None, "length", reasoning_content="a"), True, ""),
        (completion("<think>a", "length"), False, ""),
        (completion("a", "length"), True, ""),  # the template opened the thinking
        (completion("a", "length"), False, "a"),
        (completion(" a"), False, " a"),
    ],
)
def test_what_is_scored_stands_behind_the_thinking(reply, thinking, final):
    assert read_answer(reply, [], "</think>", thinking).final == final


def test_a_failed_try_is_repeated_with_the_same_body(server):
    server.reply = lambda body: (500, {}) if len(server.bodies) < 2 else (200, completion("fine"))
    (answer,), bodies, _ = ask(server, prompts=["one"])
    assert answer == "fine" and len(bodies) == 2 and bodies[0] == bodies[1]


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        ((400, {"object": "error", "message": "idlm_stride 99\nis out of range", "code": 400}), "HTTP 400 idlm_stride 99 is out of range"),
        ((503, {}), "HTTP 503"),
        ((200, completion("x", "abort")), "finish_reason abort"),
        ((200, completion("x") | {"choices": []}), "without a choice"),
    ],
)
def test_a_failing_endpoint_is_one_line_and_never_an_empty_answer(reply, part, server):
    server.reply = lambda body: reply
    with pytest.raises(EndpointError) as caught:
        ask(server, "--retries", "0")
    assert str(caught.value).startswith(f"idlm: endpoint a={server.url} ") and part in str(caught.value) and "\n" not in str(caught.value)


def test_a_resumed_run_asks_only_what_has_no_answer_yet(server, tmp_path):
    log = tmp_path / "answers-a.jsonl"
    ask(server, prompts=["one", "two"], log=log)
    with log.open("a") as file:
        file.write('{"path": "/v1/chat/com')  # where an earlier run was interrupted
    server.bodies.clear()
    answers, bodies, model = ask(server, "--out", str(tmp_path), "--resume", prompts=["one", "two", "three"], log=log)
    assert answers == ["fine"] * 3 and [body["messages"][0]["content"] for body in bodies] == ["three"]
    assert (model.asked, model.reused) == (1, 2)
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["request"]["messages"][0]["content"] for entry in logged[-1:]] == ["three"] and len(logged) == 3
