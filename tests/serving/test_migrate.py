"""`idlm migrate`: the published fork's settings become our command line, and what is lossy there is named."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from idlm_sglang.serving import cli, migrate, options

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {"use_spec_verify": True, "conditional_lora": False, "confidence_threshold": 0, "temperature": 1.0, "top_k": 50, "top_p": 0.95}


@pytest.fixture
def ask(tmp_path, capsys):
    """Exit code, comments, the command's words, and what was said on standard error."""

    def run(settings, *words):
        path = tmp_path / "config.yaml"
        path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
        code = cli.main(["migrate", str(path), *words])
        said = capsys.readouterr()
        lines = said.out.splitlines()
        comments = [line for line in lines if line.startswith("#")]
        command = [shlex.split(line) for line in lines if not line.startswith("#")]
        return code, comments, command[0] if command else None, said.err.replace(str(path), "FILE")

    return run


@pytest.mark.parametrize("stride", [2, 3, 4, 5, 16])
def test_a_shipped_configuration_becomes_its_stride_and_loses_nothing(ask, stride):
    code, comments, command, _ = ask({"block_size": 2 * stride - 1, "gen_block_size": stride, **SHIPPED})
    assert code == 0 and command[:5] == ["idlm", "serve", "MODEL", "--stride", str(stride)]
    assert not [c for c in comments if "dropped" in c or "not known" in c]


def test_the_command_is_one_that_idlm_serve_accepts(ask):
    *_, command, _ = ask({"gen_block_size": 4, **SHIPPED, "temperature": 0.6}, "--model", "yifanyu/I-DLM-8B")
    own, rest = cli.parser()[1].parse_known_args(command[2:])
    launch = options.resolve(own, rest, log_to_terminal=False)
    assert launch.model == "yifanyu/I-DLM-8B" and launch.environ == {"IDLM_STRIDE": "4"}
    assert json.loads(command[-1]) == {"temperature": 0.6, "top_k": 50, "top_p": 0.95}


def test_what_the_file_leaves_open_is_the_forks_default_and_not_ours(ask):
    code, comments, command, _ = ask("")
    assert code == 0 and command[3:5] == ["--stride", "3"]
    assert json.loads(command[-1]) == {"temperature": 1.0, "top_k": 50, "top_p": 0.95}
    assert any("temperature, top_k, top_p: not in the file" in c for c in comments)


def test_a_width_alone_gives_the_stride(ask):
    assert ask({"block_size": 9})[2][3:5] == ["--stride", "5"]


LOSSY = {
    "use_spec_verify": False,
    "confidence_threshold": 0.9,
    "confidence_accept_threshold": 0.7,
    "verify_alpha": 0.5,
    "verify_num_specs": 1,
    "fast_verify": True,
    "fast_verify_topk": 3,
    "fast_verify_topk_per_spec": [3, 2],
    "output_correction": True,
    "conditional_lora": True,
    "stats_file": "/tmp/stats",
    "rounds_file": "/tmp/rounds",
    "draft_conf_file": "/tmp/conf",
}


def test_every_lossy_key_is_named_with_its_reason_and_leaves_no_trace_in_the_command(ask):
    assert set(LOSSY) == set(migrate.DROPPED)
    clean = ask({"gen_block_size": 4})[2]
    for key, value in LOSSY.items():
        code, comments, command, _ = ask({"gen_block_size": 4, key: value})
        assert code == 0 and command == clean
        assert [c for c in comments if re.match(rf"# dropped: {key}: \w.{{15}}", c)], key


def test_a_value_that_changes_nothing_there_is_no_loss(ask):
    neutral = {key: None for key in LOSSY} | {"use_spec_verify": True, "verify_alpha": 1.0, "fast_verify": False, "confidence_threshold": 0}
    assert not [c for c in ask(neutral)[1] if "dropped" in c]


def test_an_unknown_key_is_named(ask):
    code, comments, *_ = ask({"gen_block_size": 4, "gen_block": 5})
    assert code == 0 and "# not known: gen_block: nothing was made of it" in comments


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"block_size": 7, "gen_block_size": 3}, "block_size 7 and gen_block_size 3 disagree; allowed: block_size 5, or one of them left out"),
        ({"block_size": 6}, "block_size 6 is even; allowed: 2N - 1 for a stride of N"),
        ({"gen_block_size": 17}, "gen_block_size 17 is not valid; allowed: an integer from 1 to 16"),
        ({"gen_block_size": True}, "gen_block_size True is not valid; allowed: an integer from 1 to 16"),
        ({"gen_block_size": "four"}, "gen_block_size 'four' is not valid; allowed: an integer from 1 to 16"),
        ({"temperature": "warm"}, "temperature 'warm' is not valid; allowed: a number >= 0"),
        ({"top_k": 0}, "top_k 0 is not valid; allowed: an integer >= 1, or -1 for all"),
        ({"top_p": 95}, "top_p 95 is not valid; allowed: a number above 0 and up to 1"),
        ({"top_p": float("nan")}, "top_p nan is not valid; allowed: a number above 0 and up to 1"),
    ],
)
def test_a_value_without_meaning_ends_in_one_line(ask, settings, said):
    assert ask(settings) == (2, [], None, f"idlm: FILE: {said}\n")


@pytest.mark.parametrize("text", ["a: [1,", "- 4\n- 5\n", "just words", "a: b: c", "\x00", "4: 5", "? [a]\n: b", "a: !!python/object:os.system {}"])
def test_a_file_that_is_no_settings_ends_in_one_line(ask, text):
    code, comments, command, said = ask(text)
    assert (code, comments, command) == (2, [], None)
    assert re.fullmatch(r"idlm: FILE .*; allowed: the YAML file of --dllm-algorithm-config.*\n", said), said


def test_a_file_that_is_not_there_ends_in_one_line(capsys, tmp_path):
    for path in (tmp_path / "absent.yaml", tmp_path):
        assert cli.main(["migrate", str(path)]) == 2
        assert re.fullmatch(rf"idlm: {path} cannot be read \(.*\); allowed: .*\n", capsys.readouterr().err)


def test_the_table_of_the_docs_has_every_key_and_no_other():
    table = (ROOT / "docs" / "migration.md").read_text().split("## The settings file")[1].split("\n## ")[0]
    named = {key for row in re.findall(r"^\| (`.*?) \| ", table, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}
    assert named == migrate.KNOWN
