"""What `idlm eval` refuses, each in one line that names the flag, its value and what is allowed."""

import subprocess
import sys

import pytest

from idlm_sglang.quality.published import COLUMNS, figure
from idlm_sglang.serving import cli

from .conftest import ARMS, plan

DEMO = ("--suite", "demo")
REFUSED = [
    (DEMO, ["a=http://h:1"], "1 endpoint given"),
    (DEMO, ["a=http://h:1", "a=http://h:2"], "a occurs twice"),
    (DEMO, ["a=http://h:1", "b"], "endpoint b is not valid"),
    (DEMO, ["a=http://h:1", "b=h:2"], "endpoint b=h:2 is not valid"),
    ([], ARMS, "give either --suite or --tasks"),
    ((*DEMO, "--tasks", "gsm8k_cot"), ARMS, "give either --suite or --tasks"),
    (("--suite", "all"), ARMS, "--suite all"),
    (("--suite", "paper", "--published", "GPT"), ARMS, "--published GPT"),
    ((*DEMO, "--published", "I-DLM-8B"), ARMS, "needs --suite paper"),
    ((*DEMO, "--limit", "0"), ARMS, "--limit 0"),
    ((*DEMO, "--repeats", "x"), ARMS, "--repeats x"),
    ((*DEMO, "--temperature", "hot"), ARMS, "--temperature hot"),
    ((*DEMO, "--top-p", "0"), ARMS, "--top-p 0"),
    ((*DEMO, "--margin", "0"), ARMS, "--margin 0"),
    ((*DEMO, "--thinking", "much"), ARMS, "--thinking much"),
    ((*DEMO, "--extra", "c={}"), ARMS, "--extra c={}"),
    ((*DEMO, "--extra", "isd=[1]"), ARMS, "--extra isd=[1]"),
    ((*DEMO, "--extra", '{"seed": 1}'), ARMS, "sets seed"),
    ((*DEMO, "--include-path", "/nowhere"), ARMS, "--include-path /nowhere"),
    ((*DEMO, "--resume"), ARMS, "--resume needs --out"),
]


@pytest.mark.parametrize(("words", "arms", "part"), REFUSED, ids=[part for *_, part in REFUSED])
def test_a_mistake_ends_in_one_line_and_exit_code_2(words, arms, part, capsys):
    assert cli.main(["eval", *arms, *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("idlm: ") and part in said.err and ("allowed: " in said.err or "needs" in said.err)
    assert said.err.count("\n") == 1 and not said.out


def test_an_endpoint_that_is_not_there_ends_it_in_one_line(capsys):
    assert cli.main(["eval", *ARMS, *DEMO]) == 2
    said = capsys.readouterr().err
    assert said.startswith("idlm: endpoint ar=http://127.0.0.1:1 does not answer") and said.count("\n") == 1


def test_the_papers_sampling_is_the_suites_and_flags_override_it():
    assert plan("--suite", "paper").sampling == {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "max_tokens": 32768}
    assert plan("--suite", "paper").thinking == "on" and plan("--suite", "paper").published == "I-DLM-8B"
    assert plan("--suite", "paper", "--temperature", "0", "--max-tokens", "9").sampling == {"temperature": 0.0, "top_p": 0.95, "top_k": 50, "max_tokens": 9}
    assert plan("--tasks", "gsm8k_cot").sampling == {} and plan("--tasks", "gsm8k_cot").published is None


def test_extra_fields_go_to_every_arm_or_to_one():
    found = plan(*DEMO, "--extra", '{"min_p": 0.1}', "--extra", 'isd={"custom_params": {"idlm_stride": 2}}')
    assert [arm.extra for arm in found.arms] == [{"min_p": 0.1}, {"min_p": 0.1, "custom_params": {"idlm_stride": 2}}]


def test_published_figures_are_looked_up_by_column():
    assert figure("MATH-500", "I-DLM-8B") == 96.8 and figure("AIME-24", "Qwen3-32B") == 76.7
    assert figure("ARC-C", "I-DLM-32B") is None and figure("idlm_demo_sums", COLUMNS[0]) is None


def test_without_lm_eval_one_line_says_what_to_install():
    code = "import sys; sys.modules['lm_eval'] = None; from idlm_sglang.serving import cli; sys.exit(cli.main(sys.argv[1:]))"
    said = subprocess.run([sys.executable, "-c", code, "eval", *ARMS, *DEMO], capture_output=True, text=True)
    assert said.returncode == 2 and said.stderr.count("\n") == 1
    assert "pip install 'idlm-sglang[eval]'" in said.stderr


def test_the_command_line_imports_nothing_heavy_before_it_is_needed():
    code = (
        "import sys; from idlm_sglang.serving import cli; from idlm_sglang.quality import command, options; cli.parser(); options.parser(); "
        "print([name for name in ('numpy', 'scipy', 'lm_eval', 'torch', 'httpx', 'openai') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
