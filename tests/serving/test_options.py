"""What `idlm serve` makes of its command line, before anything is loaded."""

import socket

import pytest

from idlm_sglang.config import SettingError
from idlm_sglang.demo import CHECKPOINT_DIR, RISD_ADAPTER_DIR, RISD_BASE_DIR
from idlm_sglang.serving import cli, options
from idlm_sglang.serving.ports import check_port


def launch(*words: str) -> options.Launch:
    own, rest = cli.parser()[1].parse_known_args(list(words))
    return options.resolve(own, rest, log_to_terminal=False)


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


def test_without_a_model_the_embedded_checkpoint_is_served_in_fp32_under_its_name():
    assert launch().argv == (
        *("--model-path", str(CHECKPOINT_DIR)),
        *("--dtype", "float32", "--served-model-name", "idlm-demo"),
        *("--speculative-algorithm", "ISD", "--enable-metrics"),
    )


def test_the_model_may_stand_first_or_behind_our_options_or_be_sglangs_flag(checkpoint):
    expected = ("--model-path", checkpoint, "--speculative-algorithm", "ISD", "--enable-metrics", "--tp", "2")
    assert launch(checkpoint, "--tp", "2").argv == expected
    assert launch("--stride", "3", checkpoint, "--tp", "2").argv == expected
    flag = launch("--tp", "2", "--model-path", checkpoint).argv
    assert flag == ("--speculative-algorithm", "ISD", "--enable-metrics", "--tp", "2", "--model-path", checkpoint)


def test_the_value_of_an_unknown_flag_is_not_taken_for_the_model():
    assert launch("--tp", "2").argv[-2:] == ("--tp", "2")
    assert launch("--json-model-override-args", '{"a": 1}').argv[-1] == '{"a": 1}'


def test_the_users_words_win_over_the_defaults():
    words = ("--dtype=bfloat16", "--served-model-name", "mine", "--speculative-algorithm", "EAGLE", "--enable-metrics")
    argv = launch(*words).argv
    assert argv == ("--model-path", str(CHECKPOINT_DIR), "--max-running-requests", "64", *words)


def test_a_config_file_wins_over_the_defaults(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("dtype: bfloat16\nserved_model_name: mine\nport: 31299\nenable-metrics: false\n")
    got = launch("--config", str(file))
    assert got.argv == ("--model-path", str(CHECKPOINT_DIR), "--speculative-algorithm", "ISD", "--config", str(file))
    assert got.port == 31299
    assert launch("--config", str(file), "--port", "31298").port == 31298


def test_ar_serves_the_same_checkpoint_without_an_algorithm():
    argv = launch("--ar", "--dp-size", "2").argv
    assert "--speculative-algorithm" not in argv
    assert argv[argv.index("--max-running-requests") + 1] == "64", "of each replica"
    argv = launch("--ar", "--dp-size", "2", "--tp-size", "2", "--enable-dp-attention").argv
    assert argv[argv.index("--max-running-requests") + 1] == "128", "of all ranks"


def test_settings_travel_in_the_environment_and_errors_name_what_was_typed():
    flags = ["--stride", "3", "--max-stride", "8", "--mask-token-id", "7", "--sampling-rule", "rejection", "--selfcheck", "0.5", "--salvage", "chain"]
    got = launch(*flags, "--mixed-steps", "off", "--step-ops", "torch", "--decode-graphs", "on", "--ragged-verify", "off")
    assert got.environ == {
        "IDLM_STRIDE": "3",
        "IDLM_MAX_STRIDE": "8",
        "IDLM_MASK_TOKEN_ID": "7",
        "IDLM_SAMPLING_RULE": "rejection",
        "IDLM_SELFCHECK": "0.5",
        "IDLM_SALVAGE": "chain",
        "IDLM_MIXED_STEPS": "off",
        "IDLM_STEP_OPS": "torch",
        "IDLM_DECODE_GRAPHS": "on",
        "IDLM_RAGGED_VERIFY": "off",
    }
    assert got.in_typed_words("idlm: IDLM_MASK_TOKEN_ID=7 contradicts the config") == "idlm: --mask-token-id=7 contradicts the config"


def test_an_adapter_travels_in_the_environment(checkpoint):
    got = launch(checkpoint, "--idlm-lora", checkpoint)
    assert got.environ == {"IDLM_LORA": checkpoint}
    assert got.in_typed_words(f"idlm: IDLM_LORA={checkpoint}: rank r = 0") == f"idlm: --idlm-lora={checkpoint}: rank r = 0"


def test_the_embedded_pair_is_a_base_and_its_adapter_and_with_ar_the_base_alone():
    got = launch("--demo", "risd")
    assert got.argv[:6] == ("--model-path", str(RISD_BASE_DIR), "--dtype", "float32", "--served-model-name", "risd-demo")
    assert got.environ == {"IDLM_LORA": str(RISD_ADAPTER_DIR)} and "--speculative-algorithm" in got.argv
    plain = launch("--demo", "risd", "--ar")
    assert plain.argv[1] == str(RISD_BASE_DIR) and plain.environ == {}
    assert launch("--demo", "idlm").argv == launch().argv


def test_step_ops_are_of_ar_serving_too():
    assert launch("--ar", "--step-ops", "torch").environ == {"IDLM_STEP_OPS": "torch"}


def test_metrics_can_be_left_out():
    assert "--enable-metrics" not in launch("--no-metrics").argv


def test_the_live_page_can_be_left_out():
    assert launch("--no-live-page").environ == {"IDLM_LIVE_PAGE": "off"} and launch().environ == {}


@pytest.mark.parametrize(
    ("host", "address"),
    [("0.0.0.0", "127.0.0.1:30000"), ("::", "[::1]:30000"), ("10.0.0.1", "10.0.0.1:30000"), ("fe80::1", "[fe80::1]:30000")],
)
def test_the_address_is_one_a_client_can_use(host, address):
    assert launch("--host", host).address == address


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--stride", "abc"], "--stride abc is not valid; allowed: an integer from 1 to 16, or auto"),
        (["--stride", "0"], "--stride 0 is out of range; allowed: an integer from 1 to 16, or auto"),
        (["--stride", "-1"], "--stride -1 is out of range; allowed: an integer from 1 to 16, or auto"),
        (["--stride", "17"], "--stride 17 is out of range; allowed: an integer from 1 to 16, or auto"),
        (["--stride", "auto", "--speculative-num-steps", "3"], "--stride auto and --speculative-num-steps 3 were both given; allowed: one of them"),
        (["--max-stride", "17"], "--max-stride 17 is out of range; allowed: an integer from 1 to 16"),
        (["--stride", "4", "--max-stride", "3"], "--max-stride 3 is below --stride 4; allowed: 4 to 16"),
        (["--stride", "4", "--speculative-num-steps", "2"], "--stride 4 and --speculative-num-steps 2 disagree; allowed: "),
        (["--mask-token-id", "x"], "--mask-token-id x is not valid; allowed: an integer >= 0"),
        (["--sampling-rule", "exact"], "--sampling-rule exact is not known; allowed: coupled, rejection"),
        (["--salvage", "on"], "--salvage on is not known; allowed: auto, branch, chain, off"),
        (["--ragged-verify", "yes"], "--ragged-verify yes is not known; allowed: auto, on, off"),
        (["--step-ops", "cuda"], "--step-ops cuda is not known; allowed: auto, torch, triton"),
        (["--speculative-algorithm", "EAGLE", "--step-ops", "torch"], "--step-ops torch has no meaning with --speculative-algorithm EAGLE"),
        (["--ar", "--salvage", "off"], "--salvage off has no meaning with --ar"),
        (["--ar", "--ragged-verify", "off"], "--ragged-verify off has no meaning with --ar"),
        (["--idlm-lora", "/no/such"], "--idlm-lora /no/such is not a directory; allowed: the directory of an adapter"),
        (["--ar", "--idlm-lora", "/tmp"], "--idlm-lora /tmp has no meaning with --ar"),
        (["--idlm-lora", "/tmp", "--speculative-algorithm", "EAGLE"], "--idlm-lora /tmp has no meaning with --speculative-algorithm EAGLE; allowed: "),
        (["--demo", "other"], "--demo other is not known; allowed: idlm, risd"),
        (["/tmp", "--demo", "risd"], "--demo risd and the model /tmp were both named; allowed: one of them"),
        (["--selfcheck", "1.5"], "--selfcheck 1.5 is not valid; allowed: a share from 0 (off) to 1"),
        (["--selfcheck", "x"], "--selfcheck x is not valid; allowed: a share from 0 (off) to 1"),
        (["--ar", "--selfcheck", "0"], "--selfcheck 0 has no meaning with --ar"),
        (["--ar", "--stride", "4"], "--stride 4 has no meaning with --ar"),
        (["--ar", "--max-stride", "4"], "--max-stride 4 has no meaning with --ar"),
        (["--ar", "--sampling-rule", "coupled"], "--sampling-rule coupled has no meaning with --ar"),
        (["--ar", "--speculative-algorithm", "ISD"], "--ar and --speculative-algorithm ISD were both given; allowed: one of them"),
        (["--stride", "4", "--speculative-algorithm", "EAGLE"], "--stride 4 has no meaning with --speculative-algorithm EAGLE"),
        (["/no/such/model"], "--model-path /no/such/model does not exist; allowed: a checkpoint's directory"),
        (["--model-path", "./missing"], "--model-path ./missing does not exist; allowed: a checkpoint's directory"),
        (["/tmp", "--model-path", "/tmp"], "two models were named, /tmp and --model-path /tmp; allowed: one of them"),
        (["--port", "70000"], "--port 70000 is out of range; allowed: an integer from 1 to 65535"),
        (["--port", "http"], "--port http is not valid; allowed: an integer from 1 to 65535"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml cannot be read"),
        (["--verbose", "--log-file", "x"], "--verbose and --log-file x were both given; allowed: one of them"),
    ],
)
def test_bad_input_ends_in_one_line_that_names_setting_value_and_what_is_allowed(words, expected):
    with pytest.raises(SettingError) as refused:
        launch(*words)
    line = refused.value.code
    assert line.startswith(f"idlm: {expected}") and "\n" not in line and "allowed: " in line


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(SettingError, match="holds no config.json; allowed: "):
        launch(str(tmp_path))


def test_bad_input_exits_with_a_code_and_one_line(capsys):
    assert cli.main(["serve", "--stride", "abc"]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["idlm: --stride abc is not valid; allowed: an integer from 1 to 16, or auto"]
    assert captured.out == ""


@pytest.mark.parametrize("words", [["serve", "--stride"], ["chek"], ["check", "--prot", "1"], ["--ar"]])
def test_a_word_the_command_does_not_know_ends_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main(words)
    lines = capsys.readouterr().err.splitlines()
    assert refused.value.code == 2 and len(lines) == 1 and lines[0].startswith("idlm: ")


def test_a_port_in_use_is_named_before_anything_loads(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == 1
        line = capsys.readouterr().err.strip()
        assert line.startswith(f"idlm: --port {port} is in use on 127.0.0.1") and line.endswith("; allowed: a free port")
    check_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(SettingError, match="--host 192.0.2.1 is not an address of this machine; allowed: "):
        check_port("192.0.2.1", 30000)


def test_help_and_version_answer_without_loading_sglang(capsys):
    import subprocess
    import sys

    code = "import sys, idlm_sglang.serving.cli as c; c.main(['--version']); sys.exit('torch' in sys.modules or 'sglang' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("idlm-sglang ")
    for words in (["--help"], ["serve", "--help"], ["check", "--help"]):
        with pytest.raises(SystemExit) as left:
            cli.main(words)
        assert left.value.code == 0 and "usage: idlm" in capsys.readouterr().out
