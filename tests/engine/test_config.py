"""Settings: every source, every bad value one line."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from idlm_sglang import config
from idlm_sglang.config import SettingError, Settings, hand_down, handed_down, read_settings, widened
from idlm_sglang.isd import layout


def test_defaults():
    assert read_settings(environ={}) == Settings()
    expected = {"stride": 4, "max_stride": 8, "auto": True, "mask_token_id": None, "sampling_rule": "coupled", "selfcheck": 0.001, "salvage": "auto"}
    assert expected.items() <= vars(Settings()).items()


def test_environment_and_flag():
    env = {"IDLM_STRIDE": "3", "IDLM_MAX_STRIDE": "8", "IDLM_MASK_TOKEN_ID": "7", "IDLM_SAMPLING_RULE": "rejection"}
    assert read_settings(environ=env) == Settings(3, 8, 7, "rejection", auto=False)
    assert read_settings(num_steps=5, environ={}) == Settings(6, 6, auto=False)
    assert read_settings(num_steps=2, environ={"IDLM_STRIDE": "3"}).stride == 3
    assert read_settings(environ={"IDLM_STRIDE": "16"}).max_width == 31
    assert [read_settings(environ={"IDLM_SELFCHECK": text}).selfcheck for text in ("0", "1", "0.25", "1e-4")] == [0, 1, 0.25, 1e-4]


def test_the_live_page_is_on_unless_told_otherwise():
    assert [read_settings(environ=env).live_page for env in ({}, {"IDLM_LIVE_PAGE": "on"}, {"IDLM_LIVE_PAGE": "off"})] == [True, True, False]


def test_auto_is_bounded_by_the_largest_stride_and_begins_within_it():
    assert read_settings(environ={"IDLM_STRIDE": "auto"}) == read_settings(environ={}) == Settings(4, 8, auto=True)
    assert read_settings(environ={"IDLM_MAX_STRIDE": "6"}) == Settings(4, 6, auto=True)
    assert read_settings(environ={"IDLM_STRIDE": "AUTO", "IDLM_MAX_STRIDE": "12"}) == Settings(4, 12, auto=True)
    assert read_settings(environ={"IDLM_STRIDE": "auto", "IDLM_MAX_STRIDE": "2"}) == Settings(2, 2, auto=True)


def test_auto_goes_as_far_as_the_checkpoint_was_trained_unless_told_otherwise():
    def widest(block_size, env):
        return widened(read_settings(environ=env), block_size, env).max_stride

    assert [widest(size, {}) for size in (None, 3, 7, 8, 11, 15, 40)] == [8, 8, 8, 9, 12, 16, 16]
    assert [widest(size, {}) for size in (True, "15", 15.0, -3)] == [8, 8, 8, 8], "what is no integer says nothing"
    assert widest(15, {"IDLM_STRIDE": "auto"}) == 16
    assert widest(15, {"IDLM_MAX_STRIDE": "6"}) == 6 and widest(15, {"IDLM_STRIDE": "4"}) == 4
    assert widened(Settings(), 15, {}) == Settings(max_stride=16), "nothing else changes"


@pytest.mark.parametrize(
    "steps, env, words",
    [
        (None, {"IDLM_STRIDE": "0"}, ["IDLM_STRIDE", "'0'", "1 to 16"]),
        (None, {"IDLM_STRIDE": "17"}, ["IDLM_STRIDE", "'17'", "1 to 16"]),
        (None, {"IDLM_STRIDE": "four"}, ["IDLM_STRIDE", "'four'", "1 to 16"]),
        (None, {"IDLM_STRIDE": ""}, ["IDLM_STRIDE", "''", "or auto"]),
        (3, {"IDLM_STRIDE": "auto"}, ["IDLM_STRIDE=auto", "--speculative-num-steps 3", "disagree"]),
        (None, {"IDLM_STRIDE": "auto", "IDLM_MAX_STRIDE": "0"}, ["IDLM_MAX_STRIDE", "'0'", "1 to 16"]),
        (16, {}, ["--speculative-num-steps", "16", "0 to 15"]),
        (-1, {}, ["--speculative-num-steps", "-1", "0 to 15"]),
        (3, {"IDLM_STRIDE": "8"}, ["IDLM_STRIDE=8", "--speculative-num-steps 3", "disagree"]),
        (None, {"IDLM_STRIDE": "8", "IDLM_MAX_STRIDE": "4"}, ["IDLM_MAX_STRIDE=4", "stride 8", "8 to 16"]),
        (None, {"IDLM_MAX_STRIDE": "99"}, ["IDLM_MAX_STRIDE", "'99'"]),
        (None, {"IDLM_MASK_TOKEN_ID": "-2"}, ["IDLM_MASK_TOKEN_ID", "'-2'", ">= 0"]),
        (None, {"IDLM_SELFCHECK": "2"}, ["IDLM_SELFCHECK", "'2'", "0 (off) to 1"]),
        (None, {"IDLM_SELFCHECK": "-0.1"}, ["IDLM_SELFCHECK", "'-0.1'"]),
        (None, {"IDLM_SELFCHECK": "nan"}, ["IDLM_SELFCHECK", "'nan'"]),
        (None, {"IDLM_SELFCHECK": "often"}, ["IDLM_SELFCHECK", "'often'"]),
        (None, {"IDLM_LIVE_PAGE": "yes"}, ["IDLM_LIVE_PAGE", "'yes'", "on, off"]),
        (None, {"IDLM_SALVAGE": "on"}, ["IDLM_SALVAGE", "'on'", "auto, branch, chain, off"]),
        (None, {"IDLM_MIXED_STEPS": "yes"}, ["IDLM_MIXED_STEPS", "'yes'", "on, off"]),
        (None, {"IDLM_STEP_OPS": "cuda"}, ["IDLM_STEP_OPS", "'cuda'", "auto, torch, triton"]),
        (None, {"IDLM_DECODE_GRAPHS": "yes"}, ["IDLM_DECODE_GRAPHS", "'yes'", "auto, on, off"]),
        (None, {"IDLM_RAGGED_VERIFY": "yes"}, ["IDLM_RAGGED_VERIFY", "'yes'", "auto, on, off"]),
        (None, {"IDLM_SAMPLING_RULE": "relaxed"}, ["IDLM_SAMPLING_RULE", "'relaxed'", "coupled, rejection"]),
    ],
)
def test_a_bad_value_is_one_line_with_setting_value_and_what_is_allowed(steps, env, words):
    with pytest.raises(ValueError) as error:
        read_settings(steps, env)
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


def test_a_setting_error_ends_a_command_without_a_stack_trace():
    code = "from idlm_sglang.config import SettingError; raise SettingError('x=1 is not valid; allowed: 2')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "idlm: x=1 is not valid; allowed: 2\n" and done.stdout == ""


def test_settings_reach_the_processes_that_inherit_the_environment(monkeypatch):
    monkeypatch.delenv("IDLM_RESOLVED_SETTINGS", raising=False)
    with pytest.raises(SettingError):
        handed_down()
    monkeypatch.setenv("IDLM_RESOLVED_SETTINGS", "")
    hand_down(Settings(2, 8, 5, "rejection", auto=False))
    assert handed_down() == Settings(2, 8, 5, "rejection", auto=False)


def test_a_branch_needs_a_backend_that_hides_columns():
    from idlm_sglang.engine.algorithm import resolve_salvage

    def args(attention, prefill=None, decode=None, mode="prefill"):
        halves = {"prefill_attention_backend": prefill, "decode_attention_backend": decode}
        return SimpleNamespace(attention_backend=attention, **halves, speculative_attention_mode=mode)

    assert resolve_salvage("auto", args("torch_native")) == resolve_salvage("branch", args("torch_native")) == "branch"
    for backend in (args("triton"), args("torch_native", "triton", "triton")):
        assert [resolve_salvage(asked, backend) for asked in ("auto", "branch", "chain")] == ["off", "branch", "chain"], "asked for, until it is measured"
    for backend in (args("triton", "flashinfer"), args("triton", decode="flashinfer"), args("flashinfer", "flashinfer", "triton", "decode")):
        assert [resolve_salvage(asked, backend) for asked in ("auto", "chain")] == ["off", "chain"]
        with pytest.raises(SettingError, match="--prefill-attention-backend .* and --decode-attention-backend .*; allowed: "):
            resolve_salvage("branch", backend)
    assert resolve_salvage("auto", args("flashinfer")) == "off" and resolve_salvage("chain", args("flashinfer")) == "chain"
    with pytest.raises(SettingError, match="IDLM_SALVAGE=branch .* --attention-backend flashinfer.*allowed: auto, chain, off, or --attention-backend triton"):
        resolve_salvage("branch", args("flashinfer"))


def test_attention_that_takes_no_mask_is_refused_by_name():
    """An AMD verify kernel, which SGLang may take in Triton's place, reads none."""
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    from idlm_sglang.engine.masks import check

    def triton(**fields):
        backend = TritonAttnBackend.__new__(TritonAttnBackend)
        vars(backend).update({"use_verify_splitkv": False, "use_verify_shared_kv": False, "enable_deterministic": False} | fields)
        return backend

    assert check(triton()) and not check(SimpleNamespace(hides_new_columns=True))
    for backend in (triton(use_verify_splitkv=True), triton(use_verify_shared_kv=True), triton(enable_deterministic=True), SimpleNamespace()):
        with pytest.raises(SettingError, match="the attention of (TritonAttnBackend|SimpleNamespace); allowed: chain, off"):
            check(backend)


def test_the_settings_of_the_server_are_the_policies_of_the_algorithm():
    assert (config.BRANCH, config.CHAIN, config.OFF) == (layout.BRANCH, layout.CHAIN, layout.OFF)
