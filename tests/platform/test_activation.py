"""The CPU platform is chosen only where there is no accelerator and nobody asked for another engine."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from idlm_sglang.platform import PLATFORM_CLASS, activate

ACCELERATORS = ("cuda", "xpu", "mps", "npu", "musa", "hpu")


@pytest.fixture
def bare_machine(monkeypatch):
    """No accelerator, whatever this machine has."""
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    for name in ACCELERATORS:
        _set_device(monkeypatch, name, lambda: False)


def _set_device(monkeypatch, name, is_available):
    """Only `is_available` changes on a module that exists: SGLang uses the rest of it."""
    if hasattr(torch, name):
        monkeypatch.setattr(getattr(torch, name), "is_available", is_available, raising=False)
    else:
        monkeypatch.setattr(torch, name, SimpleNamespace(is_available=is_available), raising=False)


def test_chosen_on_a_machine_without_accelerator(bare_machine):
    assert activate() == PLATFORM_CLASS


@pytest.mark.parametrize("name", ACCELERATORS)
def test_never_chosen_beside_an_accelerator(bare_machine, monkeypatch, name):
    _set_device(monkeypatch, name, lambda: True)
    assert activate() is None


@pytest.mark.parametrize("name", ACCELERATORS)
def test_a_build_without_the_device_module_counts_as_absent(bare_machine, monkeypatch, name):
    monkeypatch.delattr(torch, name)
    assert activate() == PLATFORM_CLASS


def test_a_driver_that_fails_counts_as_present(bare_machine, monkeypatch):
    def broken():
        raise RuntimeError("driver mismatch")

    _set_device(monkeypatch, "cuda", broken)
    assert activate() is None


def test_sglangs_own_cpu_engine_wins_when_asked_for(bare_machine, monkeypatch):
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert activate() is None


def test_a_gpu_machine_keeps_sglangs_cuda_platform(monkeypatch):
    """Through SGLang's own discovery, with the entry point installed."""
    from sglang.srt import platforms

    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    assert type(platforms._resolve_platform()) is platforms.CudaSRTPlatform


def test_sglangs_discovery_finds_the_class(bare_machine):
    from sglang.srt import platforms

    platform = platforms._resolve_platform()
    assert f"{type(platform).__module__}:{type(platform).__name__}" == PLATFORM_CLASS
    assert platform.is_out_of_tree() and not platform.capabilities.supports_triton


def test_the_profiler_that_a_request_starts_knows_the_platform(bare_machine):
    """/start_profile reaches the scheduler, where an exception would end the server."""
    from sglang.srt import platforms

    platform = platforms._resolve_platform()
    assert getattr(torch.profiler.ProfilerActivity, platform.get_torch_profiler_activity_str()) == platform.get_torch_profiler_activity()


def test_asking_imports_neither_sglang_nor_the_platform_class():
    """A GPU machine's processes all ask; the answer must cost them nothing."""
    program = (
        "import sys, idlm_sglang.platform as p; p.activate();"
        "print(sorted(m for m in sys.modules if m.startswith(('sglang', 'idlm_sglang.platform.'))))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
