"""What the platform writes into SGLang's server arguments, and what it refuses."""

import os
from types import SimpleNamespace

import pytest

from idlm_sglang.platform import cpu
from idlm_sglang.platform import threads as cores
from idlm_sglang.platform.cpu import IdlmCpuPlatform


@pytest.fixture(autouse=True)
def openmp_left_open(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what the platform sets
    for name in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TRITON_INTERPRET", cpu.OVERLAP_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def _applied(**given):
    """Arguments after the platform, as SGLang's resolution presents them on a CPU before it."""
    args = SimpleNamespace(
        **{
            "device": "cpu",
            "attention_backend": "intel_amx",
            "prefill_attention_backend": None,
            "decode_attention_backend": None,
            "sampling_backend": "pytorch",
            "max_total_tokens": None,
            "max_running_requests": None,
            "chunked_prefill_size": None,
            "disable_overlap_schedule": False,
            "tp_size": 1,
            "dp_size": 1,
            "nnodes": 1,
            "enable_memory_saver": False,
            "enable_forward_pass_metrics": False,
            "enable_strict_thinking": False,
            "reasoning_parser": None,
            "pp_size": 1,
        }
        | given
    )
    IdlmCpuPlatform().apply_server_args_defaults(args)
    return args


def test_defaults_fit_a_small_machine():
    args = _applied()
    assert (args.attention_backend, args.sampling_backend) == ("torch_native", "pytorch")
    assert args.max_total_tokens == cpu.DEFAULT_MAX_TOTAL_TOKENS
    assert args.max_running_requests == cpu.DEFAULT_MAX_RUNNING_REQUESTS
    assert args.chunked_prefill_size == cpu.DEFAULT_CHUNKED_PREFILL_SIZE


@pytest.mark.parametrize("field", ["max_total_tokens", "max_running_requests", "chunked_prefill_size"])
def test_what_the_user_gave_stays(field):
    assert getattr(_applied(**{field: 32}), field) == 32


def test_openmp_threads_spin_briefly_unless_told_otherwise(monkeypatch):
    _applied()
    assert os.environ["GOMP_SPINCOUNT"] == cpu.OPENMP_SPIN_COUNT
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    _applied()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    _applied()
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize(
    "affinity, physical, quota, ranks, threads",
    [(1, 1, "max 100000", 1, "1"), (2, 2, "max 100000", 1, "1"), (2, 2, "", 2, "1"), (32, 16, "", 1, "15"), (32, 16, "", 4, "3"), (64, 32, "400000 100000", 1, "3"), (4, 32, "", 1, "3")],
)
def test_a_core_is_left_to_the_other_processes_unless_told_otherwise(monkeypatch, tmp_path, affinity, physical, quota, ranks, threads):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / ("cpu.max" if quota else "none"))
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setattr(cores.psutil, "cpu_count", lambda logical: None if logical else physical)
    monkeypatch.setattr("sglang.srt.utils.common.get_cpu_ids_by_node", lambda: ["0", "1", "2", "3"])
    _applied(tp_size=ranks)
    assert os.environ["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    _applied(tp_size=ranks)
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_scheduling_does_not_overlap_unless_told_otherwise(monkeypatch):
    assert _applied().disable_overlap_schedule
    monkeypatch.setenv(cpu.OVERLAP_VARIABLE, "1")
    assert not _applied().disable_overlap_schedule and _applied(disable_overlap_schedule=True).disable_overlap_schedule
    monkeypatch.setenv(cpu.OVERLAP_VARIABLE, "yes")
    with pytest.raises(ValueError, match="IDLM_CPU_OVERLAP='yes' is not valid; allowed: 0, 1"):
        _applied()


@pytest.mark.parametrize("field", ["enable_memory_saver", "enable_forward_pass_metrics"])
def test_what_needs_a_gpu_is_refused(field):
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} True cannot be served on a CPU; allowed: off"):
        _applied(**{field: True})


def test_strict_thinking_needs_a_gpu_where_a_parser_says_what_thinking_is():
    _applied(enable_strict_thinking=True)
    with pytest.raises(ValueError, match="--enable-strict-thinking True cannot be served on a CPU with --reasoning-parser; allowed: off"):
        _applied(enable_strict_thinking=True, reasoning_parser="qwen3")


def test_ranks_have_a_numa_node_or_cores_of_their_own(monkeypatch):
    monkeypatch.setattr("sglang.srt.utils.common.get_cpu_ids_by_node", lambda: ["0,1"])
    monkeypatch.delenv(cpu._BIND, raising=False)
    with pytest.raises(ValueError, match=r"2 ranks, and this machine has 1 NUMA node; allowed: .*SGLANG_CPU_OMP_THREADS_BIND with the cores of each, such as '0\|1'"):
        _applied(dp_size=2)
    monkeypatch.setenv(cpu._BIND, "0|1")
    _applied(dp_size=2), _applied(tp_size=2)
    with pytest.raises(ValueError, match=r"4 ranks, and SGLANG_CPU_OMP_THREADS_BIND=0\|1 names the cores of fewer"):
        _applied(dp_size=2, tp_size=2)


def test_another_device_is_refused():
    with pytest.raises(ValueError, match="--device cuda: this machine has no accelerator; allowed: cpu"):
        _applied(device="cuda")


@pytest.mark.parametrize("field", ["attention_backend", "prefill_attention_backend", "decode_attention_backend"])
@pytest.mark.parametrize("backend", ["fa3", "flashinfer", "triton"])
def test_backends_that_need_an_accelerator_are_refused(field, backend):
    flag = "--" + field.replace("_", "-")
    with pytest.raises(ValueError, match=f"{flag} {backend}: .*allowed: torch_native"):
        _applied(**{field: backend})


def test_interpreted_triton_is_allowed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _applied(attention_backend="triton").attention_backend == "triton"


def test_serves_isd_and_no_algorithm_that_needs_a_draft_model_on_a_gpu():
    platform = IdlmCpuPlatform()
    assert platform.supports_speculative_algorithm("ISD")
    assert not platform.supports_speculative_algorithm("EAGLE")
