"""The arms of a comparison: what each is called, and the command that serves it."""

import json
import shlex
import sys
from argparse import ArgumentParser
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from idlm_sglang.config import AUTO, SettingError, stride_or_auto
from idlm_sglang.platform.float32 import ATTENTION, float32_environ, in_float32
from idlm_sglang.serving.options import DEMO_NAME

STOCK, AR, ISD, URL = "stock", "ar", "isd", "url"

# SGLang's own class for the architecture; stock SGLang knows no I-DLM, and serves another model under SDAR's name.
_STOCK_CLASS = {"IDLMForCausalLM": "Qwen3ForCausalLM", "SDARForCausalLM": "Qwen3ForCausalLM"}

# What every arm gets from here.
_SET_HERE = ("--host", "--port", "--max-running-requests", "--stride", "--ar", "--selfcheck")

ALLOWED = "stock, ar, isd, isd:N, isd:auto or a URL, with a name in front (NAME=...) where SGLang flags follow"


@dataclass(frozen=True)
class Arm:
    """One server of the comparison.

    Attributes:
        name: in tables and plots.
        kind: STOCK (SGLang without the plugin), AR (with it, one token per step), ISD, or URL (already running).
        stride: N of an ISD arm, AUTO where the controller chooses it, else None.
        flags: the arm's own SGLang flags.
        url: where a URL arm is.
    """

    name: str
    kind: str
    stride: int | str | None = None
    flags: tuple[str, ...] = ()
    url: str | None = None


def parse(text: str) -> Arm:
    """An arm from ``[NAME=]BASE [FLAGS]``. Raises :class:`SettingError`."""
    shown = f"--arm {text!r}"
    try:
        first, *flags = shlex.split(text)
    except ValueError as error:
        raise SettingError(f"{shown} is not valid ({error}); allowed: {ALLOWED}") from None
    name, separator, base = first.partition("=")
    if not separator or "://" in name:
        name, base = first, first
    if not name or "|" in name:
        raise SettingError(f"{shown} has no name that a table can hold; allowed: {ALLOWED}")
    if flags and not separator:
        raise SettingError(f"{shown} has flags of its own and no name; allowed: NAME={text}")
    if base.startswith(("http://", "https://")):
        if flags:
            raise SettingError(f"{shown} is running already, flags cannot reach it; allowed: the URL alone")
        return Arm(name, URL, url=base.rstrip("/").removesuffix("/v1"))
    refuse_own(shown, flags)
    kind, _, stride = base.partition(":")
    if kind not in (STOCK, AR, ISD) or (stride and kind != ISD) or base.endswith(":"):
        raise SettingError(f"{shown} is not known; allowed: {ALLOWED}")
    number = (stride and stride_or_auto(f"{shown}: stride {stride}", stride)) or AUTO
    return Arm(name, kind, number if kind == ISD else None, tuple(flags))


def refuse_own(shown: str, flags: list[str]) -> None:
    """Raise :class:`SettingError` for a flag that is set here for every arm."""
    for flag in flags:
        if flag.partition("=")[0] in _SET_HERE:
            raise SettingError(f"{shown} sets {flag}, which is set here for every arm; allowed: other flags of SGLang")


def parse_all(texts: list[str]) -> list[Arm]:
    """The arms in order; the first is the one that others are compared with. Raises :class:`SettingError`."""
    arms = [parse(text) for text in texts]
    if len(arms) < 2:
        raise SettingError(f"{len(arms)} arm was given; allowed: two or more --arm")
    names = [arm.name for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SettingError(f"--arm {twice[0]!r} was given twice; allowed: different names, such as a={twice[0]} and b={twice[0]}")
    return arms


def command(arm: Arm, model: Path | str, embedded: bool, common: tuple[str, ...], port: int, scratch: Path) -> tuple[list[str], dict[str, str]]:
    """The command that serves an arm on 127.0.0.1:``port``, and what it needs in its environment.

    ``common``: SGLang flags for every arm, in front of the arm's own. ``scratch``: a directory for a configuration that stock SGLang can read.
    """
    # Said to all arms: one that took its default from elsewhere would be compared at another precision.
    named = ["--dtype", "float32", "--served-model-name", DEMO_NAME] if embedded else []
    flags = [*named, "--host", "127.0.0.1", "--port", str(port), *common, *arm.flags]
    if arm.kind == STOCK:
        # A dLLM of SGLang's own reads the published architecture as what it is.
        own = "--dllm-algorithm" in arm.flags
        served = model if own or not Path(model).is_dir() else stock_checkpoint(Path(model), scratch)
        # With the plugin, a server sees to float32 itself.
        dtype, attention = _named(flags)
        environ = {"SGLANG_PLUGINS": _other_plugins()} | float32_environ(dtype)
        if in_float32(dtype) and attention is None:
            flags += ["--attention-backend", ATTENTION]
        return [sys.executable, "-P", "-m", "sglang.launch_server", "--model-path", str(served), *flags], environ
    own = ["--ar"] if arm.kind == AR else ["--stride", str(arm.stride), "--selfcheck", "0"]
    return [sys.executable, "-P", "-m", "idlm_sglang.serving.cli", "serve", str(model), *own, "--verbose", *flags], {}


def _named(flags: list[str]) -> tuple[str | None, str | None]:
    """The precision and the attention backend."""
    reader = ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--dtype")
    reader.add_argument("--attention-backend")
    found = reader.parse_known_args(flags)[0]
    return found.dtype, found.attention_backend


def _other_plugins() -> str:
    """All of SGLang's plugins here but ISD: others' kernels, and the CPU platform's share, without which nothing runs where there is no accelerator."""
    return ",".join(sorted({point.name for point in entry_points(group="sglang.srt.plugins")} - {"idlm"}))


def stock_checkpoint(model: Path, scratch: Path) -> Path:
    """The checkpoint under the architecture that stock SGLang serves it with: links to its files and a config.json that says so."""
    config = json.loads((model / "config.json").read_text())
    known = [_STOCK_CLASS.get(name, name) for name in config.get("architectures") or []]
    if known == config.get("architectures"):
        return model
    config.update(architectures=known, model_type="qwen3")
    config.pop("auto_map", None)
    target = scratch / "stock-checkpoint"
    target.mkdir(exist_ok=True)
    for file in model.iterdir():
        if file.name != "config.json" and not (target / file.name).exists():
            (target / file.name).symlink_to(file.resolve())
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target
