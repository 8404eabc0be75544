"""What a figure was measured with."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "sglang", "xgrammar", "transformers", "flashinfer-python", "sglang-kernel", "triton", "numpy")


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def commit() -> str:
    """The checked-out commit, with a plus where the code differs from it."""
    root = Path(__file__).parents[2]
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "idlm_sglang", "benchmarks/kernels"], cwd=root).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if dirty else "")


def fingerprint(device: str, threads: int, command: str) -> dict[str, str]:
    """Name to value, for the head of a CSV."""
    clock = "CPU time of the one thread" if device == "cpu" and threads == 1 else "wall clock"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(threads),
        "clock": clock,
        "load": f"{os.getloadavg()[0]:.1f} runnable tasks in the minute before",
        "versions": ", ".join(f"{package} {version(package)}" for package in PACKAGES) + f", Python {platform.python_version()}",
        "commit": commit(),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
