"""The words of `idlm bench`: bad ones end in one line before anything starts, good ones make the plan."""

import json
from collections import Counter

import pytest

from idlm_sglang.bench import prompts
from idlm_sglang.bench.run import plan
from idlm_sglang.serving import cli

BAD = [
    ["--arm", "ar"],
    ["--arm", "ar", "--arm", "nothing"],
    ["--concurrency", "0"],
    ["--concurrency", "4", "4"],
    ["--concurrency", "four"],
    ["--temperature", "-1"],
    ["--temperature", "hot"],
    ["--repeats", "0"],
    ["--max-tokens", "0"],
    ["--sampling", "[1]"],
    ["--sampling", '{"temperature": 1}'],
    ["--sampling", '{"stream_options": {}}'],
    ["--seed", "x"],
    ["/no/such/checkpoint"],
    ["--prompts", "/no/such/file"],
    ["--arm", "a=http://h:1", "--arm", "b=http://h:2", "--server-flags", "--tp-size 2"],
    ["--server-flags", "--a 'b"],
    ["--server-flags", "--port 1"],
    ["--arm", "ar", "--arm", "b=isd --max-running-requests 8"],
    ["--arm", "a=http://h:1", "--arm", "b=http://h:2"],
    ["--tokenizer", "/no/such/checkpoint"],
    ["--together", "--alone"],
    ["--one-batch", "--max-tokens", "1"],
    ["--one-batch", "--sampling", '{"tools": []}'],
    ["--nonsense"],
]


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_bad_words_end_in_one_line(words, tmp_path, capsys):
    try:
        code = cli.main(["bench", *words, "--out", str(tmp_path / "out")])
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr().err
    assert code == 2 and told.startswith("idlm: ") and told.count("\n") == 1, told
    assert not (tmp_path / "out" / "raw.jsonl").exists()


def options(*words):
    from idlm_sglang.bench import options

    return options.resolve(options.parser(cli._Parser).parse_args(words), words)


def test_arms_take_turns_and_each_begins_as_often():
    points = plan(options("--arm", "stock", "--arm", "isd:1", "--arm", "isd:4", "--repeats", "3"), False)
    assert len(points) == len(set(points)) == 3 * 3 * 7 * 2
    blocks = [points[i : i + 3] for i in range(0, len(points), 3)]
    assert all(len({p.arm for p in block}) == 3 and len({(p.temperature, p.concurrency, p.repeat) for p in block}) == 1 for block in blocks)
    assert set(Counter(block[0].arm for block in blocks).values()) == {14}


def test_alone_each_arm_is_started_once_a_repeat():
    points = plan(options("--arm", "ar", "--arm", "isd:4", "--repeats", "2", "--concurrency", "1", "8"), True)
    changes = [p.arm for p, before in zip(points, [None, *points]) if before is None or before.arm != p.arm]
    assert len(points) == len(set(points)) == 16 and changes == ["ar", "isd:4", "ar"]
    assert [p.repeat for p in points] == [0] * 8 + [1] * 8


def test_keys_are_not_written_down():
    found = options("--arm", "ar", "--arm", "isd", "--api-key", "secret", "--server-flags", "--api-key secret --admin-api-key=secret")
    assert "secret" not in found.command and found.api_key == "secret" and "secret" in " ".join(found.server_flags)


def test_quick_has_fewer_points_and_what_is_said_wins():
    assert options("--quick").concurrencies == (1, 8, 64) and options("--quick", "--concurrency", "2").concurrencies == (2,)
    assert options().count(1) == 48 and options().count(64) == 384 and options("--quick").count(64) == 192


def test_every_arm_gets_the_same_requests_and_every_repeat_others():
    drawn = [prompts.draw(None, 20, repeat, 1, {"temperature": 1.0}) for repeat in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({r["seed"] for r in drawn[0]}) == 20 and all(r["stream_options"] == {"include_usage": True} for r in drawn[0])


def test_prompts_of_a_file_are_read_and_their_own_fields_win_but_those_of_the_comparison(tmp_path):
    file = tmp_path / "p.jsonl"
    own = {"temperature": 0.6, "stream": False, "n": 2, "seed": 5, "model": "m"}
    file.write_text(json.dumps({"prompt": "Hi", "max_completion_tokens": 7, **own}) + '\n\n{"messages": [{"role": "user", "content": "Ho"}]}\n')
    source = prompts.read(file)
    drawn = prompts.draw(source, 8, 0, 1, {"max_tokens": 160, "temperature": 0.0})
    assert {r["max_tokens"] for r in drawn if r["messages"][0]["content"] == "Hi"} == {7} and len([r for r in drawn if r["max_tokens"] == 7]) == 4
    assert all(r["temperature"] == 0.0 and "stream" not in r and "n" not in r and "model" not in r for r in drawn) and len({r["seed"] for r in drawn}) == 8
    assert {r["max_tokens"] for r in drawn if r["messages"][0]["content"] == "Ho"} == {160}


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"text": "x"}', '{"messages": []}'])
def test_a_file_without_requests_is_refused_in_one_line(tmp_path, text):
    file = tmp_path / "p.jsonl"
    file.write_text(text + "\n")
    with pytest.raises(SystemExit, match="--prompts .*allowed: "):
        prompts.read(file)


def test_requests_are_written_as_the_load_generator_reads_them(tmp_path):
    prompts.write(prompts.draw(None, 3, 0, 1, {"max_tokens": 9}), tmp_path / "r.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["max_tokens"] for row in rows] == [9] * 3 and all(row["messages"][-1]["role"] == "user" for row in rows)
