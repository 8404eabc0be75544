"""`idlm replay`: what it asks, what it calls a difference, and how it ends."""

import http.server
import io
import json
import sys
import threading

import pytest

from idlm_sglang.serving import cli, replay


class Fake(http.server.ThreadingHTTPServer):
    """Answers with what ``reply(path, body)`` makes of a request, and keeps the requests."""

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.asked = reply, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        status, answer = self.server.reply(self.path, body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    running = []

    def start(reply):
        server = Fake(reply)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def native(tokens, finish="stop", seed=None, text=None):
    meta = {"finish_reason": {"type": finish}} | ({} if seed is None else {"seed": seed})
    return {"text": str(tokens) if text is None else text, "output_ids": tokens, "meta_info": meta}


def generate(answer, text="a", **params):
    return {"path": "/generate", "request": {"text": text, "sampling_params": params}, "response": answer}


def chat(content, finish="stop", **choice):
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish, **choice}]}


def ran(tmp_path, entries, server, *words):
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(json.dumps(e) for e in entries) + "\n")
    return cli.main(["replay", str(file), "--url", server if isinstance(server, str) else server.url, *words])


def test_equal_answers_end_with_zero_and_one_line(tmp_path, serve, capsys):
    server = serve(lambda path, body: (200, native([1, 2, 3])))
    assert ran(tmp_path, [generate(native([1, 2, 3]), temperature=0)] * 3, server) == 0
    assert capsys.readouterr().out == "idlm: 3 of 3 answers replayed at one token per step: 3 equal, 0 different; 0 not replayable\n"


@pytest.mark.parametrize(
    "now, line",
    [
        (native([1, 2, 4]), "line 1: token 2 differs: 3 in the log, 4 now (3 and 3 tokens)"),
        (native([1, 2]), "line 1: token 2 differs: 3 in the log, the end now (3 and 2 tokens)"),
        (native([1, 2, 3, 4]), "line 1: token 3 differs: the end in the log, 4 now (3 and 4 tokens)"),
        (native([1, 2, 3], "length"), "line 1: finish reason differs: stop in the log, length now"),
    ],
)
def test_a_difference_is_one_line_with_its_position_and_exit_code_one(tmp_path, serve, capsys, now, line):
    server = serve(lambda path, body: (200, now))
    assert ran(tmp_path, [generate(native([1, 2, 3]), temperature=0)], server) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == line and "0 equal, 1 different" in out[1] and len(out) == 2


def test_where_there_are_no_token_ids_the_text_is_compared(tmp_path, serve, capsys):
    server = serve(lambda path, body: (200, chat("Yes, it was")))
    entry = {"path": "/v1/chat/completions", "request": {"messages": [], "temperature": 0}, "response": chat("Yes, it is")}
    assert ran(tmp_path, [entry], server) == 1
    assert "line 1: character 8 differs: 'i' in the log, 'w' now (10 and 11 characters)" in capsys.readouterr().out


def test_tool_calls_are_compared_without_their_ids(tmp_path, serve):
    def answer(call_id, arguments):
        call = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"choices": [{"message": {"content": None, "tool_calls": [call]}, "finish_reason": "tool_calls"}]}

    server = serve(lambda path, body: (200, answer("call_2", "{}")))
    entry = {"path": "/v1/chat/completions", "request": {"temperature": 0}, "response": answer("call_1", "{}")}
    assert ran(tmp_path, [entry], server) == 0
    assert ran(tmp_path, [entry | {"response": answer("call_1", '{"a": 1}')}], server) == 1


def test_what_is_asked_is_the_request_at_one_token_per_step_under_the_answers_seed(tmp_path, serve):
    server = serve(lambda path, body: (200, native([1]) if path == "/generate" else chat("x", response_token_ids=[1])))
    drawn = generate(native([1], seed=2**52 + 1), temperature=0.7, custom_params={"mine": 1})
    drawn["request"] |= {"stream": True, "rid": "r", "return_logprob": True}
    asked = generate(native([1], seed=5), temperature=0.7, sampling_seed=5)
    given = {"path": "/v1/chat/completions", "request": {"seed": 6, "stream": True, "stream_options": {}}, "response": chat("x")}
    drawn_chat = {"path": "/v1/chat/completions", "request": {"return_meta_info": True}, "response": chat("x", meta_info={"seed": 7})}
    assert ran(tmp_path, [drawn, asked, given, drawn_chat], server, "--clients", "1", "--api-key", "k") == 0
    bodies = [body for _, body, _ in server.asked]
    assert bodies[0] == {
        "text": "a",
        "sampling_params": {"temperature": 0.7, "n": 1, "sampling_seed": 2**52 + 1, "custom_params": {"mine": 1, "idlm_stride": 1}},
    }
    assert bodies[1]["sampling_params"]["sampling_seed"] == 5
    assert bodies[2] == {"seed": 6, "n": 1, "custom_params": {"idlm_stride": 1}}
    assert bodies[3] == {"return_meta_info": True, "seed": 7, "n": 1, "custom_params": {"idlm_stride": 1}}
    assert {key for _, _, key in server.asked} == {"Bearer k"}


def test_lists_of_prompts_and_several_choices_are_asked_one_by_one(tmp_path, serve):
    def reply(path, body):
        if path == "/generate":
            return 200, native([len(body["input_ids"]), body["sampling_params"]["sampling_seed"]])
        return 200, {"choices": [{"text": body["prompt"] + str(body["seed"]), "token_ids": [1], "finish_reason": "stop"}]}

    server = serve(reply)
    batch = {
        "path": "/generate",
        "request": {"input_ids": [[1], [2, 2]], "sampling_params": {"temperature": 1, "n": 2}},
        "response": [native([1, 10], seed=10), native([1, 11], seed=11), native([2, 12], seed=12), native([2, 13], seed=13)],
    }
    mixed = {
        "path": "/generate",
        "request": {"input_ids": [[1], [2, 2]], "sampling_params": [{"sampling_seed": 3, "top_k": 9}, {"sampling_seed": 4, "top_k": 8}]},
        "response": [native([1, 3]), native([2, 4])],
    }
    texts = [{"index": i, "text": p + "5", "token_ids": [1], "finish_reason": "stop"} for i, p in enumerate(["p", "p", "q", "q"])]
    completions = {"path": "/v1/completions", "request": {"prompt": ["p", "q"], "n": 2, "seed": 5}, "response": {"choices": texts}}
    assert ran(tmp_path, [batch, mixed, completions], server, "--clients", "3") == 0
    assert len(server.asked) == 10
    assert sorted(b["sampling_params"]["top_k"] for p, b, _ in server.asked if "top_k" in b.get("sampling_params", {})) == [8, 9]
    assert all(b["return_token_ids"] for p, b, _ in server.asked if p == "/v1/completions")


def test_answers_that_cannot_be_replayed_are_listed(tmp_path, serve, capsys):
    server = serve(lambda path, body: (200, native([1])))
    log = [
        generate(native([1]), temperature=0.5),
        generate(native([1])),
        generate(native([1], "abort"), temperature=0),
        generate(native([1]), temperature=0),
        generate([native([1], seed=1), native([1])], temperature=0.5, n=2),
    ]
    assert ran(tmp_path, log, server) == 0
    out = capsys.readouterr().out.splitlines()
    seedless = "not replayable: sampled, and neither the request nor the answer has a seed"
    assert out[:4] == [f"line 1: {seedless}", f"line 2: {seedless}", "line 3: not replayable: it was aborted", f"line 5 answer 2: {seedless}"]
    assert out[4].endswith("2 of 6 answers replayed at one token per step: 2 equal, 0 different; 4 not replayable")
    assert ran(tmp_path, log[:3], server) == 2, "nothing could be replayed"


def test_a_refused_request_is_a_difference(tmp_path, serve, capsys):
    server = serve(lambda path, body: (400, {"error": "too long"}))
    assert ran(tmp_path, [generate(native([1]), temperature=0)], server) == 1
    assert 'line 1: the server refuses the request: HTTP 400 {"error": "too long"}' in capsys.readouterr().out


@pytest.mark.parametrize("line", ["{", "[]", '{"path": "/x", "request": {}, "response": {}}', '{"path": "/generate", "request": {}}', '{"path": "/generate", "request": {}, "response": {}}'])
def test_a_log_that_is_none_is_one_line(tmp_path, capsys, line):
    file = tmp_path / "log"
    file.write_text("\n" + line)
    assert cli.main(["replay", str(file)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{file} line 2 is not a logged answer; allowed: " in err


@pytest.mark.parametrize(
    "words, part",
    [
        (["/no/such/file"], "/no/such/file cannot be read (No such file or directory); allowed: "),
        (["-", "--clients", "0"], "--clients 0 is out of range; allowed: an integer from 1 to 256"),
        (["-", "--clients", "x"], "--clients x is not valid"),
        (["-", "--url", "localhost:30000"], "--url localhost:30000 is not valid; allowed: http://HOST:PORT"),
    ],
)
def test_a_bad_word_is_one_line(monkeypatch, capsys, words, part):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert cli.main(["replay", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("idlm: ") and part in err and err.count("\n") == 1


def test_standard_input_and_an_address_with_v1(monkeypatch, serve):
    server = serve(lambda path, body: (200, native([1])))
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(generate(native([1]), temperature=0))))
    assert cli.main(["replay", "-", "--url", server.url + "/v1/"]) == 0
    assert [path for path, *_ in server.asked] == ["/generate"]


@pytest.mark.parametrize(
    "reply, reason", [(None, "does not answer (["), ((401, {}), "refuses the API key (HTTP 401)"), ((200, {"hello": 1}), "does not answer as SGLang does")]
)
def test_no_server_no_key_or_another_server_is_one_line_and_exit_code_two(tmp_path, serve, capsys, reply, reason):
    server = serve(lambda path, body: reply)
    if reply is None:
        server.shutdown()
        server.server_close()
    assert ran(tmp_path, [generate(native([1]), temperature=0)] * 3, server.url) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1 and err.startswith(f"idlm: --url {server.url} ")


def test_the_first_difference_of_two_equal_answers_is_none():
    assert replay.difference(replay.Answer([1], "a", "stop"), replay.Answer([1], "other text of the same tokens", "stop")) == ""
