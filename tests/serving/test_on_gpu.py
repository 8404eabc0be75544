"""A start on a GPU, up to where its arguments are resolved: the defaults, and what is refused. No GPU takes part (``on_gpu``)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from idlm_sglang.demo import CHECKPOINT_DIR

ISD = ("--speculative-algorithm", "ISD")
CASES = {
    "ar": ((), {}),
    "isd": (ISD, {}),
    "auto": ((*ISD, "--dtype", "bfloat16"), {"IDLM_STRIDE": "auto", "IDLM_MAX_STRIDE": "8"}),
    "graphs": (ISD, {"IDLM_DECODE_GRAPHS": "on", "IDLM_SALVAGE": "branch"}),
    "flashinfer": ((*ISD, "--attention-backend", "flashinfer"), {}),
    "fa3": ((*ISD, "--attention-backend", "fa3"), {}),
    "prompts apart": ((*ISD, "--prefill-attention-backend", "flashinfer"), {}),
    "steps apart": ((*ISD, "--decode-attention-backend", "triton"), {}),
    "both apart": ((*ISD, "--prefill-attention-backend", "flashinfer", "--decode-attention-backend", "triton"), {}),
    "branch apart": ((*ISD, "--prefill-attention-backend", "flashinfer", "--decode-attention-backend", "triton"), {"IDLM_SALVAGE": "branch"}),
    "branch in steps": (
        (*ISD, "--prefill-attention-backend", "flashinfer", "--decode-attention-backend", "triton", "--speculative-attention-mode", "decode"),
        {"IDLM_SALVAGE": "branch"},
    ),
    "ragged": (ISD, {"IDLM_RAGGED_VERIFY": "on"}),
    "prompts captured": ((*ISD, "--cuda-graph-config", '{"prefill":{"backend":"full"}}'), {}),
    "replicas": ((*ISD, "--dp-size", "2"), {}),
    "float32": ((*ISD, "--dtype", "float32"), {}),
    "float32 ar": (("--dtype", "float32"), {"TRITON_F32_DEFAULT": "tf32"}),
}


@pytest.fixture(scope="module")
def found() -> dict:
    asked = [{"argv": ["--model-path", str(CHECKPOINT_DIR), *argv], "environ": environ} for argv, environ in CASES.values()]
    hidden = {"TRITON_F32_DEFAULT", "SGLANG_FORCE_FUSED_OP_BACKEND", "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.on_gpu"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env={name: value for name, value in os.environ.items() if name not in hidden} | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


def backends(case: dict) -> list:
    assert case["refused"] is None, case["refused"]
    return [case["resolved"][f"{half}attention_backend"] for half in ("", "prefill_", "decode_")]


def test_isd_starts_with_an_attention_backend_that_can_verify(found):
    assert backends(found["ar"])[0] == "fa3", "SGLang's own choice for this GPU"
    for name in ("isd", "auto", "graphs", "float32"):
        assert backends(found[name]) == ["triton", None, None], name
    assert backends(found["flashinfer"])[0] == "flashinfer"
    assert "--attention-backend fa3" in found["fa3"]["refused"] and "allowed: triton, flashinfer" in found["fa3"]["refused"]


def test_half_of_the_backends_named_leaves_the_other_to_isd(found):
    assert backends(found["prompts apart"]) == ["triton", "flashinfer", None]
    assert backends(found["steps apart"]) == ["triton", None, "triton"]
    assert backends(found["both apart"]) == ["triton", "flashinfer", "triton"]


def test_a_branch_takes_one_backend_for_both(found):
    for name in ("branch apart", "branch in steps"):
        refused = found[name]["refused"]
        assert "IDLM_SALVAGE=branch" in refused and "--prefill-attention-backend flashinfer and --decode-attention-backend triton" in refused


def test_rows_graphs_and_requests_at_a_time(found):
    auto, graphs = found["auto"]["resolved"], found["graphs"]["resolved"]
    assert auto["speculative_num_draft_tokens"] == 15 and auto["max_running_requests"] == 64 and auto["page_size"] == 1
    assert auto["decode_graphs"] == "disabled" and graphs["decode_graphs"] == found["ar"]["resolved"]["decode_graphs"] == "full"
    assert "IDLM_RAGGED_VERIFY=on" in found["ragged"]["refused"]


def test_captured_prompts_are_refused_in_any_words(found):
    assert "--cuda-graph-config" in found["prompts captured"]["refused"] and "; allowed: breakable, disabled" in found["prompts captured"]["refused"]


def test_each_replica_serves_as_many_requests_as_one_server(found):
    assert found["replicas"]["resolved"]["max_running_requests"] == 64


def test_flashinfer_has_the_workspace_of_a_qwen3_model(found):
    assert found["flashinfer"]["environ"].get("SGLANG_FLASHINFER_WORKSPACE_SIZE") == str(512 << 20)
    assert "SGLANG_FLASHINFER_WORKSPACE_SIZE" not in found["isd"]["environ"]


def test_float32_is_float32(found):
    wanted = {"SGLANG_FORCE_FUSED_OP_BACKEND": "torch", "TRITON_F32_DEFAULT": "ieee"}

    def asked(name: str) -> dict:
        return {key: value for key, value in found[name]["environ"].items() if key in wanted}

    assert asked("float32") == wanted
    assert asked("float32 ar") == {"SGLANG_FORCE_FUSED_OP_BACKEND": "torch"}, "what the user set stays"
    assert asked("isd") == asked("auto") == {}
    assert backends(found["float32"])[0] == backends(found["float32 ar"])[0] == "triton", "FA3 has no float32"
