"""What `idlm serve` says: the choices it made, the address, a request to paste."""

import json
import shlex
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from idlm_sglang.config import ON
from idlm_sglang.serving.options import Launch

DEMO_QUESTION = "What is an introspective diffusion language model?"


def versions() -> str:
    """One line: this package, SGLang, torch and Python."""
    import platform

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return f"idlm-sglang {of('idlm-sglang')} (SGLang {of('sglang')}, torch {of('torch')}, Python {platform.python_version()})"


def base_url(launch: Launch, resolved: dict[str, Any]) -> str:
    """Where a client on this machine reaches the server, without a path."""
    return f"{'https' if resolved['tls'] else 'http'}://{launch.address}"


def curl(launch: Launch, resolved: dict[str, Any]) -> str:
    """A chat request as one line of shell. An API key is taken from the variable API_KEY, never printed."""
    body = {
        "model": resolved["served_as"],
        "messages": [{"role": "user", "content": DEMO_QUESTION}],
        "max_tokens": 128,
    }
    words = ["curl", "-sS", *(["-k"] if resolved["tls"] else []), f"{base_url(launch, resolved)}/v1/chat/completions"]
    words += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    line = " ".join(shlex.quote(word) for word in words)
    return f'{line} -H "Authorization: Bearer $API_KEY"' if resolved["key"] else line


def text(launch: Launch, resolved: dict[str, Any]) -> str:
    """The lines printed once everything is resolved and the model begins to load."""
    url = base_url(launch, resolved)
    rows = [
        ("model", f"{launch.model}: {resolved['architecture']}, {resolved['dtype']}, as \"{resolved['served_as']}\""),
        ("decoding", _decoding(resolved)),
        *([("adapter", _adapter(resolved["lora"]))] if resolved["lora"] else []),
        ("MASK", _mask(resolved)),
        ("concurrency", _concurrency(resolved)),
        ("device", _device(resolved)),
        *([("steps", _steps(resolved))] if resolved["decode_graphs"] else []),
        ("metrics", f"{url}/metrics" if resolved["metrics"] else "off (--no-metrics)"),
        *([("live page", f"{url}/idlm")] if resolved["live"] else []),
        ("log", "below" if launch.log_file is None else str(launch.log_file)),
        ("url", f"{url}/v1"),
        ("try", curl(launch, resolved)),
    ]
    return "\n".join(f"  {name:<12} {value}" for name, value in rows)


def _decoding(resolved: dict[str, Any]) -> str:
    stride = resolved["stride"]
    if stride is None:
        return f"{resolved['algorithm']}" if resolved["algorithm"] else "autoregressive, one token per forward (--ar)"
    if resolved["max_stride"] == 1:
        return "stride 1: one token per forward"
    if resolved["auto"]:
        return f"stride auto: 1 to {resolved['max_stride']} tokens per forward, whichever is fastest; sampling rule {resolved['rule']}"
    more = f", requests may ask for up to {resolved['max_stride']}" if resolved["max_stride"] > stride else ""
    return f"stride {stride}: up to {stride} tokens per forward of {2 * stride - 1} rows{more}; sampling rule {resolved['rule']}"


def _concurrency(resolved: dict[str, Any]) -> str:
    if not resolved["concurrency"]:
        return "as much as memory allows"
    return f"{resolved['concurrency']} requests{' per replica' if resolved['replicas'] > 1 else ''}"


def _steps(resolved: dict[str, Any]) -> str:
    """On a GPU: whether the host stands between a step and the next."""
    if resolved["decode_graphs"] == ON:
        return f"decode graphs on, step ops {resolved['step_ops']}"
    return f"decode graphs off, step ops {resolved['step_ops']}: AR, whose graphs are on, may be faster (docs/gpu-validation.md; --decode-graphs on)"


def _adapter(lora: dict[str, Any]) -> str:
    return f"{lora['path']}, rank {lora['rank']}, at the MASK rows alone: the answers are the base model's own"


def _mask(resolved: dict[str, Any]) -> str:
    if resolved["mask"] is None:
        return "none"
    token, source = resolved["mask"]
    return f"token {token}, from the {source}"


def _device(resolved: dict[str, Any]) -> str:
    ranks = [f"{name} {resolved[key]}" for name, key in (("TP", "tp"), ("DP", "dp")) if resolved[key] > 1]
    return ", ".join([resolved["device"], f"{resolved['attention']} attention", *ranks, f"platform {resolved['platform']}"])
