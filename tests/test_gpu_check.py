"""``make gpu-check``, as far as it goes without a GPU: what it would run exists, one check that fails keeps no other from running, and nothing is left behind."""

import importlib.util
import re
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser

import psutil
import pytest
import torch

from tests import gpu_check
from tests.gpu_check import CHECKS, ROOT, Check


def test_every_command_is_of_something_that_is_there():
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        flag, module, *words = check.command
        assert flag == "-m" and importlib.util.find_spec(module), check
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), check


def test_what_is_asked_of_the_benchmarks_can_be_asked(monkeypatch, tmp_path):
    from benchmarks.step_time.options import parse as step_time
    from idlm_sglang.bench import options

    monkeypatch.chdir(tmp_path)
    for check in CHECKS:
        words = [word.replace("{out}", str(tmp_path)) for word in check.command[2:]]
        if check.name.startswith("steps"):
            flags = step_time(words).server_flags
            assert flags[:2] == ("--attention-backend", "triton") and flags[-2:] == ("--cuda-graph-backend-prefill", "disabled")
        if check.name == "bench":
            found = options.resolve(options.parser(ArgumentParser).parse_args(words[1:]), words).arms
            assert [arm.name for arm in found] == ["stock", "n1", "n4", "n4eager"] and all("--mem-fraction-static" in arm.flags for arm in found)


def test_the_page_names_every_check():
    said = set(re.findall(r"`([a-z-]+)`", (ROOT / "docs" / "gpu-validation.md").read_text()))
    assert {check.name for check in CHECKS} <= said


def test_a_check_that_fails_or_hangs_keeps_no_other_from_running(tmp_path):
    serving = f"import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)  # {tmp_path.name}'], start_new_session=True)"
    checks = [
        Check("fails", ("-c", "print('what went wrong'); raise SystemExit(3)"), 60),
        Check("hangs", ("-c", f"{serving}; time.sleep(600)"), 2),
        Check("killed", ("-c", f"{serving}; os.kill(os.getpid(), 9)"), 60),
        Check("passes", ("-c", "import os; print(os.environ['IDLM_STEP_OPS'])"), 60, gpu_check.KERNELS),
    ]
    said = []
    assert gpu_check.run_all(checks, tmp_path, 5, "a machine", said.append) == 3
    assert [line.split(",")[0] for line in said] == ["fails: failed", "hangs: too long", "killed: failed", "passes: passed"]
    table = (tmp_path / "table.md").read_text()
    assert "a machine" in table and "| fails | failed |" in table and "what went wrong" in table and "`IDLM_STEP_OPS=triton python -c" in table
    assert "| passes | passed |" in table and table.rstrip().endswith("| triton |")
    assert left_of(tmp_path.name) == [], "a server was left behind"
    assert gpu_check.run_all(checks, tmp_path, 0, "a machine", said.append) == 4 and "no time left" in said[-1]


def left_of(name: str) -> list[int]:
    """Processes with that in their command, those that are just ending given a moment."""
    deadline = time.monotonic() + 10
    while found := [p.pid for p in psutil.process_iter(["cmdline", "status"]) if name in " ".join(p.info["cmdline"] or []) and p.info["status"] != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return found


def test_an_interrupt_ends_the_check_that_runs(tmp_path):
    code = f"from pathlib import Path; from tests import gpu_check as g; g.run(g.Check('long', ('-c', 'import time; time.sleep(600)  # {tmp_path.name}'), 600), Path({str(tmp_path)!r}), 600)"
    running = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any((tmp_path.name in " ".join(p.info["cmdline"] or [])) and p.ppid() == running.pid for p in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) != 0 and left_of(tmp_path.name) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_lists():
    refused = subprocess.run([sys.executable, "-m", "tests.gpu_check"], capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 1 and refused.stderr.strip().splitlines() == [
        "gpu_check: this machine has no GPU that torch can use; allowed: --list, or a machine with one"
    ]
    listed = subprocess.run([sys.executable, "-m", "tests.gpu_check", "--list", "--only", "answers-graphs"], capture_output=True, text=True, cwd=ROOT)
    assert listed.stdout.startswith("answers-graphs: IDLM_DECODE_GRAPHS=on python -m pytest")
    with pytest.raises(SystemExit, match="--only speed is not a check; allowed: plugin, answers"):
        gpu_check.chosen(["speed"])
