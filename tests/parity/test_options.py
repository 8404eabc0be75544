"""Mistakes end in one line and exit code 2, before anything is asked; requests are sorted by how they can be compared."""

import pytest

from idlm_sglang.config import SettingError
from idlm_sglang.parity import prompts
from idlm_sglang.serving import cli

TWO = ["parity", "--baseline", "http://127.0.0.1:1", "--candidate", "http://127.0.0.1:1"]


@pytest.mark.parametrize(
    "words, part",
    [
        (["parity", "--baseline", "ftp://x", "--candidate", "http://y"], "--baseline ftp://x is not valid; allowed: http://HOST:PORT"),
        (["parity", "--candidate", "http://y"], "the following arguments are required: --baseline"),
        ([*TWO, "--tie-margin", "-1"], "--tie-margin -1 is not valid; allowed: a number from 0 to 100"),
        ([*TWO, "--alpha", "0.9"], "--alpha 0.9 is not valid"),
        ([*TWO, "--limit", "0"], "--limit 0 is out of range; allowed: an integer >= 1"),
        ([*TWO, "--concurrency", "many"], "--concurrency many is not valid; allowed: an integer from 1 to 1024"),
        ([*TWO, "--seeded", "never"], "--seeded never is not valid; allowed: auto, exact, distribution"),
        ([*TWO, "--min-speed-ratio", "1", "--speed-rounds", "0"], "--min-speed-ratio 1 needs timed rounds"),
        ([*TWO, "--prompts", "/nowhere"], "--prompts /nowhere cannot be read (No such file or directory)"),
        ([*TWO, "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (TWO, "idlm: endpoint baseline=http://127.0.0.1:1 does not answer"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, part, capsys):
    try:
        code = cli.main(words)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err
    assert code == 2 and part in said and said.startswith("idlm: ") and said.count("\n") == 1, said


@pytest.mark.parametrize(
    "line",
    ["{", "7", '{"messages": []}', '{"prompt": 5}', '{"path": "/nowhere", "request": {}}', '{"path": "/generate", "request": {}, "frob": 1}', '{"prompt": "a", "expected": 4}', ""]
)
def test_a_line_that_is_no_request_is_named(tmp_path, line):
    file = tmp_path / "requests.jsonl"
    file.write_text('"Hello"\n' + line if line else "\n")
    with pytest.raises(SettingError, match="line 2" if line else "is empty"):
        prompts.read(file)


def test_requests_are_sorted_by_how_their_answers_can_be_compared(tmp_path):
    file = tmp_path / "requests.jsonl"
    rows = [
        ('"Hello"', prompts.SAMPLED),
        ('{"prompt": "Hello", "temperature": 0, "expected": "Hi"}', prompts.GREEDY),
        ('{"messages": [{"role": "user", "content": "x"}], "seed": 0}', prompts.SEEDED),
        ('{"messages": [{"role": "user", "content": "x"}], "top_k": 1, "seed": 0}', prompts.GREEDY),
        ('{"path": "/generate", "request": {"text": "a", "sampling_params": {"sampling_seed": 4}}, "response": {}}', prompts.SEEDED),
        ('{"path": "/generate", "request": {"text": ["a", "b"], "sampling_params": [{"temperature": 0}, {}]}}', prompts.SAMPLED),
        ('{"path": "/v1/completions", "request": {"prompt": "a", "temperature": 0}}', prompts.GREEDY),
    ]
    file.write_text("\n".join(line for line, _ in rows))
    found = prompts.read(file)
    assert [ask.kind for ask in found] == [kind for _, kind in rows]
    assert found[1].expected == "Hi" and "expected" not in found[1].body and found[1].body["messages"][0]["content"] == "Hello"
    assert len(prompts.read(file, 2)) == 2
    assert set(prompts.counts(prompts.read(None))) == {prompts.GREEDY, prompts.SEEDED, prompts.SAMPLED}
