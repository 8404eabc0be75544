"""What a result depends on: versions, device, checkpoint, commands."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from idlm_sglang.bench.options import masked
from idlm_sglang.bench.servers import Served
from idlm_sglang.config import AUTO
from idlm_sglang.platform import accelerator_available
from idlm_sglang.platform.threads import threads_per_rank
from idlm_sglang.serving.device import device_name

_PACKAGES = ("idlm-sglang", "sglang", "torch", "transformers", "triton", "flashinfer-python")
_WHOLE = 2**30  # bytes of weights that are read whole; of larger files the first and last MiB
_EDGE = 2**20
_FLAGS = ("dtype", "attention_backend", "prefill_attention_backend", "decode_attention_backend", "tp_size", "dp_size", "page_size", "disable_overlap_schedule", "disable_radix_cache", "mem_fraction_static",
          "max_running_requests", "chunked_prefill_size", "speculative_algorithm", "speculative_num_draft_tokens", "cuda_graph_max_bs", "version")  # fmt: skip


def machine() -> dict[str, Any]:
    """Versions and device of this process."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "commit": _commit(),
        "device": device_name(),
        "processor": _processor(),
        "threads": _threads(),
    }


def _threads() -> dict[str, str]:
    found = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    return found if found or accelerator_available() else {"OMP_NUM_THREADS": f"{threads_per_rank(1)} (the CPU platform's default)"}


def server(served: Served) -> dict[str, Any]:
    """One arm: its command, and what its server says of itself."""
    info = served.get("/server_info")
    state = (info.get("internal_states") or [{}])[0]
    return {
        "kind": served.arm.kind,
        "stride": AUTO if state.get("idlm", {}).get("auto") else state.get("idlm", {}).get("stride"),
        "command": masked(served.command),
        "environ": served.environ,
        "url": served.arm.url,
        "running_limit": served.running_limit(),
        "model_path": served.get("/model_info").get("model_path"),
        "kv_tokens": info.get("max_total_num_tokens") or state.get("memory_usage", {}).get("token_capacity"),
        "flags": {name: info[name] for name in _FLAGS if name in info},
    }


def checkpoint(path: Path) -> str:
    """A hash of a checkpoint's configuration and weights: SHA-256 over names, sizes and contents.

    Of files above 1 GiB only the first and the last MiB are read; the hash then begins with ``edges:``.
    """
    found, whole = hashlib.sha256(), True
    for file in sorted(f for f in path.iterdir() if f.name == "config.json" or f.suffix in (".safetensors", ".bin")):
        size = file.stat().st_size
        found.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            if size <= _WHOLE:
                found.update(content.read())
            else:
                whole = False
                found.update(content.read(_EDGE))
                content.seek(-_EDGE, os.SEEK_END)
                found.update(content.read())
    return ("" if whole else "edges:") + found.hexdigest()[:16]


def of_file(path: Path) -> str:
    """A short hash of one file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of a checkout that this runs from, with + where it was changed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "") if found.returncode == 0 else None


def _processor() -> str:
    try:
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
