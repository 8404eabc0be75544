"""What an arm may be called and be made of, and what each is started as."""

import json

import pytest

from idlm_sglang.bench.arms import AR, ISD, STOCK, URL, Arm, command, parse, parse_all, stock_checkpoint
from idlm_sglang.config import SettingError
from idlm_sglang.demo import CHECKPOINT_DIR


@pytest.mark.parametrize(
    "text, arm",
    [
        ("stock", Arm("stock", STOCK)),
        ("ar", Arm("ar", AR)),
        ("isd", Arm("isd", ISD, "auto")),
        ("isd:8", Arm("isd:8", ISD, 8)),
        ("isd:auto", Arm("isd:auto", ISD, "auto")),
        ("again=ar", Arm("again", AR)),
        ("ngram=stock --speculative-algorithm NGRAM", Arm("ngram", STOCK, flags=("--speculative-algorithm", "NGRAM"))),
        ("rule=isd:2 --sampling-rule rejection", Arm("rule", ISD, 2, ("--sampling-rule", "rejection"))),
        ("http://10.0.0.1:30000/v1", Arm("http://10.0.0.1:30000/v1", URL, url="http://10.0.0.1:30000")),
        ("prod=https://host/", Arm("prod", URL, url="https://host")),
    ],
)
def test_an_arm_is_read(text, arm):
    assert parse(text) == arm


@pytest.mark.parametrize("text", ["", "eagle", "isd:", "isd:0", "isd:17", "isd:x", "ar:4", "=ar", "stock --dtype bfloat16", "a=http://h:1 --dtype bfloat16", "a='ar", "a|b=ar", "a=ar --port 1", "a=isd --stride 2"])
def test_another_is_refused_in_one_line(text):
    with pytest.raises(SettingError) as refused:
        parse(text)
    assert "--arm" in str(refused.value) and "allowed: " in str(refused.value) and "\n" not in str(refused.value)


def test_two_different_names_are_needed():
    for texts in (["ar"], ["ar", "ar"], ["a=ar", "a=isd:2"]):
        with pytest.raises(SettingError):
            parse_all(texts)
    assert [arm.name for arm in parse_all(["a=ar", "b=ar"])] == ["a", "b"]


def test_stock_sglang_reads_the_checkpoint_as_its_own_class_and_loads_no_plugin_of_isd(tmp_path):
    words, environ = command(parse("stock"), CHECKPOINT_DIR, True, ("--enable-metrics",), 31000, tmp_path)
    assert "idlm_cpu" in environ["SGLANG_PLUGINS"].split(",") and "idlm" not in environ["SGLANG_PLUGINS"].split(",") and "sglang.launch_server" in words
    served = stock_checkpoint(CHECKPOINT_DIR, tmp_path)
    assert str(served) in words
    config = json.loads((served / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["model_type"] == "qwen3"
    assert (served / "model.safetensors").resolve() == (CHECKPOINT_DIR / "model.safetensors").resolve()


def test_stock_sglang_computes_in_float32_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    words, environ = command(parse("stock"), CHECKPOINT_DIR, True, (), 31000, tmp_path)
    assert words[words.index("--attention-backend") + 1] == "triton" and environ["TRITON_F32_DEFAULT"] == "ieee"
    words, environ = command(parse("a=stock --dtype bfloat16"), CHECKPOINT_DIR, True, (), 31000, tmp_path)
    assert "--attention-backend" not in words and "TRITON_F32_DEFAULT" not in environ
    words, _ = command(parse("a=stock --attention-backend=fa3"), CHECKPOINT_DIR, True, (), 31000, tmp_path)
    assert "triton" not in words, "what was typed stays"


@pytest.mark.parametrize("text", ["stock", "ar", "isd:4"])
def test_every_arm_of_the_embedded_checkpoint_is_told_its_precision_and_its_name(text, tmp_path):
    words, _ = command(parse(text), CHECKPOINT_DIR, True, (), 31000, tmp_path)
    assert words[words.index("--dtype") + 1] == "float32" and words[words.index("--served-model-name") + 1] == "idlm-demo"
    words, _ = command(parse(text), CHECKPOINT_DIR, False, (), 31000, tmp_path)
    assert "--dtype" not in words, "other checkpoints are served in their own"


def test_the_published_config_loses_its_remote_code(tmp_path):
    model = tmp_path / "published"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"architectures": ["SDARForCausalLM"], "model_type": "sdar", "auto_map": {"AutoModel": "x.y"}}))
    config = json.loads((stock_checkpoint(model, tmp_path) / "config.json").read_text())
    assert config == {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def test_a_dllm_arm_reads_the_checkpoint_as_what_it_is(tmp_path):
    words, _ = command(parse("sdar=stock --dllm-algorithm LowConfidence"), CHECKPOINT_DIR, False, (), 31000, tmp_path)
    assert words[words.index("--model-path") + 1] == str(CHECKPOINT_DIR)


def test_common_flags_stand_before_the_arm_s_own():
    words, _ = command(parse("a=isd:8 --page-size 16"), "owner/name", False, ("--page-size", "1"), 31000, None)
    assert words.index("1") < words.index("16") and words[words.index("--stride") + 1] == "8"


def test_an_adapter_is_a_flag_of_an_arm_and_reaches_idlm_serve(tmp_path):
    from idlm_sglang.serving import cli, options

    (tmp_path / "config.json").write_text("{}")
    arm = parse(f"risd=isd:4 --idlm-lora {tmp_path}")
    words, _ = command(arm, tmp_path, False, (), 31000, tmp_path)
    own, rest = cli.parser()[1].parse_known_args(words[words.index("serve") + 1 :])
    launch = options.resolve(own, rest, log_to_terminal=False)
    assert launch.environ["IDLM_LORA"] == str(tmp_path) and launch.environ["IDLM_STRIDE"] == "4"
