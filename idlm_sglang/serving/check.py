"""`idlm check`: can this environment serve? One line per item, cheap ones first, exit code 1 on any FAIL."""

import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import distribution, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

from idlm_sglang import demo
from idlm_sglang.config import SettingError
from idlm_sglang.serving.options import MAX_PORT, integer
from idlm_sglang.serving.ports import check_port

OK, WARN, FAIL = "ok", "warn", "FAIL"

MIN_PYTHON = (3, 11)
MIN_FREE_DISK = 2  # GiB: logs, caches of compiled kernels
MIN_FREE_MEMORY = 4  # GiB: the server's own processes take about 3 with the embedded checkpoint
MIN_SHARED_MEMORY = 1  # GiB: NCCL between several GPUs
ENTRY_POINTS = {
    "sglang.srt.plugins": "idlm_sglang.plugin:register",
    "sglang.srt.platforms": "idlm_sglang.platform:activate",
}


@dataclass(frozen=True)
class Item:
    """One line of the report."""

    status: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.name:<14} {self.text}"


def run(host: str, port: str) -> int:
    """Print every item as it becomes known; 1 if any of them fails, else 0."""
    failed = 0
    for name, look in _looks(host, port):
        item = _guarded(name, look)
        print(item, flush=True)
        failed += item.status == FAIL
    print(f"idlm: {failed} of the above must be mended before this environment can serve" if failed else "idlm: ready to serve")
    return 1 if failed else 0


def _looks(host: str, port: str) -> Iterator[tuple[str, Callable[[], tuple[str, str]]]]:
    yield "python", python
    yield "sglang", sglang
    yield "prometheus", prometheus
    yield "checkpoint", embedded_checkpoint
    yield "port", lambda: port_free(host, port)
    yield "disk", disk
    yield "memory", memory
    yield "shared memory", shared_memory
    yield "entry points", registered
    yield "torch", torch_build
    yield "adapter", embedded_adapter
    yield "hooks", hooks
    yield "platform", platform


def _guarded(name: str, look: Callable[[], tuple[str, str]]) -> Item:
    """An item; whatever goes wrong while looking is a FAIL with its reason, not a stack trace."""
    try:
        status, text = look()
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0].removeprefix("idlm: ") if lines else type(error).__name__
        return Item(FAIL, name, reason if isinstance(error, SettingError) else f"{type(error).__name__}: {reason}")
    return Item(status, name, text)


def python() -> tuple[str, str]:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < MIN_PYTHON:
        return FAIL, f"{found}; needed: {'.'.join(map(str, MIN_PYTHON))} or newer"
    return OK, f"{found} at {sys.executable}"


def sglang() -> tuple[str, str]:
    from idlm_sglang import compat

    compat.check_version()
    return OK, version("sglang")


def prometheus() -> tuple[str, str]:
    if find_spec("prometheus_client") is None:
        return FAIL, "prometheus_client is not installed; idlm serve has metrics on (--no-metrics goes without)"
    return OK, f"prometheus_client {version('prometheus_client')}"


def embedded_checkpoint() -> tuple[str, str]:
    weights = demo.CHECKPOINT_DIR / "model.safetensors"
    if not weights.is_file():
        return FAIL, f"{weights} is missing; install again"
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if not demo.CHECKPOINT_SHA256:
        return WARN, f"this installation pins no checksum; found sha256 {found[:12]}..."
    if found != demo.CHECKPOINT_SHA256:
        return FAIL, f"sha256 {found[:12]}..., expected {demo.CHECKPOINT_SHA256[:12]}...: not the file that was shipped; install again"
    return OK, f"embedded, {weights.stat().st_size / 1e6:.1f} MB, sha256 {found[:12]}..."


def port_free(host: str, port: str) -> tuple[str, str]:
    check_port(host, integer("--port", port, 1, MAX_PORT))
    return OK, f"{port} is free on {host}"


def disk() -> tuple[str, str]:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    existing = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    text = f"{free:.0f} GiB free for downloaded checkpoints in {home}"
    return (OK, text) if free >= MIN_FREE_DISK else (WARN, f"{text}; at least {MIN_FREE_DISK} are advised")


def memory() -> tuple[str, str]:
    import psutil

    free = psutil.virtual_memory().available / 2**30
    text = f"{free:.1f} GiB available"
    return (OK, text) if free >= MIN_FREE_MEMORY else (WARN, f"{text}; at least {MIN_FREE_MEMORY} are advised")


def shared_memory() -> tuple[str, str]:
    if not os.path.isdir("/dev/shm"):
        return OK, "no /dev/shm on this system"
    size = shutil.disk_usage("/dev/shm").total / 2**30
    if size < MIN_SHARED_MEMORY:
        return WARN, f"/dev/shm has {size * 1024:.0f} MiB: enough for one GPU; for several start the container with --shm-size=1g or more"
    return OK, f"/dev/shm has {size:.1f} GiB"


def registered() -> tuple[str, str]:
    """Both entry points, each found once, and from the package that is running."""
    import idlm_sglang

    for group, value in ENTRY_POINTS.items():
        found = [point for point in entry_points(group=group) if point.value == value]
        if len(found) != 1:
            return FAIL, f"{value} is registered {len(found)} times in {group}, needed: once; install again with pip"
        if found[0].dist is None or found[0].dist.name != "idlm-sglang":
            return FAIL, f"{value} in {group} comes from another distribution; uninstall that one"
    here = Path(idlm_sglang.__file__).resolve().parent
    installed = _installed_at()
    if installed != here:
        return FAIL, f"the running package is {here}, the installed one {installed}; remove one of them"
    return OK, f"plugin and platform, from {here}"


def _installed_at() -> Path:
    """Where pip says the package is: beside its metadata, or in the checkout of an editable install."""
    found = distribution("idlm-sglang")
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return Path(unquote(urlparse(origin["url"]).path)).resolve() / "idlm_sglang"
    return Path(str(found.locate_file("idlm_sglang"))).resolve()


def torch_build() -> tuple[str, str]:
    import torch

    from idlm_sglang.serving.device import device_name

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return OK, f"{torch.__version__} ({built}); {device_name()}"


def embedded_adapter() -> tuple[str, str]:
    """The pair of `idlm serve --demo risd`."""
    from idlm_sglang.adapter import check_adapter, read_adapter

    config = json.loads((demo.RISD_BASE_DIR / "config.json").read_text())
    found = read_adapter(str(demo.RISD_ADAPTER_DIR))
    check_adapter(found, SimpleNamespace(**config))
    return OK, f"embedded, rank {found.rank}, fits the embedded AR base"


def hooks() -> tuple[str, str]:
    """SGLang loads its plugins as it does when serving; then every hook must have been taken."""
    from sglang.srt.plugins import load_plugins

    from idlm_sglang import compat

    with warnings.catch_warnings():
        # SGLang's modules say at import what this device lacks; the platform's line says it once.
        warnings.simplefilter("ignore")
        load_plugins()
    compat.assert_applied()
    return OK, f"{len(compat.patches())} of {len(compat.patches())} taken by SGLang"


def platform() -> tuple[str, str]:
    from sglang.srt.platforms import current_platform

    from idlm_sglang.platform import accelerator_available

    name = type(current_platform).__name__
    if accelerator_available():
        return OK, f"{name}: an accelerator is used"
    if name != "IdlmCpuPlatform":
        return WARN, f"{name}, without an accelerator; the plugin's CPU platform was not chosen (SGLANG_PLATFORM, SGLANG_USE_CPU_ENGINE)"
    return OK, f"{name}: no accelerator here, torch on the CPU"
