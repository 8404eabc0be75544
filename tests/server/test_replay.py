"""`idlm replay` against a real server: a log of strided answers of every endpoint, and one with a token changed."""

import json

import pytest

from idlm_sglang.serving import cli
from tests.server.harness import chat, prompts

SAMPLED = {"temperature": 0.9, "top_p": 0.95}


@pytest.fixture(scope="module")
def log(isd):
    """Answers as a gateway would log them: greedy, seeded and unseeded, lists, several choices, a stream's last event."""
    entries = []

    def ask(path, request):
        entries.append({"path": path, "request": request, "response": isd.post(path, request).json()})

    for i, text in enumerate(prompts(16, seed=251)):
        ask("/generate", {"text": text, "sampling_params": {"max_new_tokens": 24, **(SAMPLED if i % 2 else {"temperature": 0})}})
    batch = [chat("Tell me a story."), "river stone"]
    ask("/generate", {"text": batch, "sampling_params": {"max_new_tokens": 16, "n": 2, **SAMPLED}})
    ask("/generate", {"text": batch, "sampling_params": [{"max_new_tokens": 16, **SAMPLED}, {"max_new_tokens": 9, "temperature": 0}]})
    chats = {"model": "default", "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 24}
    ask("/v1/chat/completions", {**chats, "temperature": 0})
    ask("/v1/chat/completions", {**chats, "temperature": 1.0, "seed": 12})
    ask("/v1/chat/completions", {**chats, "temperature": 1.0, "n": 3, "return_meta_info": True})
    ask("/v1/chat/completions", {**chats, "temperature": 1.0, "return_meta_info": True, "return_output_ids_in_sglext": True})
    written = {"model": "default", "prompt": batch, "max_tokens": 16, "temperature": 1.0, "seed": 13}
    ask("/v1/completions", {**written, "n": 2, "return_token_ids": True})
    ask("/v1/completions", {**written, "temperature": 0})
    request = {"text": batch[0], "stream": True, "sampling_params": {"max_new_tokens": 24, **SAMPLED}}
    lines = [line for line in isd.post("/generate", request, stream=True).iter_lines() if line.startswith(b"data: {")]
    entries.append({"path": "/generate", "request": request, "response": json.loads(lines[-1][6:])})
    return entries


def replayed(server, entries, tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, entries)))
    code = cli.main(["replay", str(file), "--url", server.url, "--clients", "8"])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("name", ["isd", "ar"])
def test_a_log_of_strided_answers_replays(request, log, name, tmp_path, capsys):
    """At one token per step of the same server, and in AR serving."""
    code, out = replayed(request.getfixturevalue(name), log, tmp_path, capsys)
    print(out)
    assert code == 0 and "35 of 35 answers replayed at one token per step: 35 equal, 0 different; 0 not replayable" in out


def test_a_changed_token_and_a_changed_word_are_found(isd, log, tmp_path, capsys):
    changed = json.loads(json.dumps([log[0], log[23]]))
    changed[0]["response"]["output_ids"][0] += 1
    choice = changed[1]["response"]["choices"][1]
    choice["text"] = choice["text"][:5] + "#" + choice["text"][6:]
    code, out = replayed(isd, changed, tmp_path, capsys)
    assert code == 1 and "line 1: token 0 differs" in out and "line 2 answer 2: character 5 differs: '#' in the log" in out


def test_another_seed_is_a_difference(isd, tmp_path, capsys):
    """Each answer alone may come out the same of another seed: the more so the surer the model is of it. Of sixteen hot ones some do not."""
    entries = []
    for text in prompts(16, seed=257):
        request = {"text": text, "sampling_params": {"max_new_tokens": 24, "temperature": 1.5}}
        entries.append({"path": "/generate", "request": request, "response": isd.post("/generate", request).json()})
    assert replayed(isd, entries, tmp_path, capsys)[0] == 0
    for entry in entries:
        entry["response"]["meta_info"]["seed"] += 1
    code, out = replayed(isd, entries, tmp_path, capsys)
    print(out)
    assert code == 1
