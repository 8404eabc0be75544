"""What the decode view may ask for."""

from typing import Any

MAX_TOKENS = 8192
_MAX_SEED = 2**53 - 1  # what JavaScript's numbers hold


class Mistake(ValueError):
    """What is wrong with a request: one line."""


def asked(body: Any, max_stride: int) -> dict:
    """``prompt``, ``mode`` and SGLang's ``sampling_params`` of a request's body.

    Fields: ``prompt`` (text), ``mode`` (``chat``, the default, or ``raw``), ``max_tokens``, ``temperature``, ``seed``, ``stride``.

    Raises:
        Mistake: one line with field, value and what is allowed.
    """
    if not isinstance(body, dict):
        raise Mistake(f"the body is a {type(body).__name__}; allowed: an object with prompt")
    allowed = ("prompt", "mode", "max_tokens", "temperature", "seed", "stride")
    for name in body:
        if name not in allowed:
            raise Mistake(f"{name[:40]!r} is not known; allowed: {', '.join(allowed)}")
    prompt, mode = body.get("prompt"), body.get("mode", "chat")
    if not isinstance(prompt, str) or not prompt:
        raise Mistake("prompt is missing; allowed: text that is not empty")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise Mistake("prompt holds half of a surrogate pair; allowed: Unicode text") from None
    if mode not in ("chat", "raw"):
        raise Mistake(f"mode={mode!r} is not known; allowed: chat, raw")
    temperature = body.get("temperature", 0)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 <= temperature <= 10:
        raise Mistake(f"temperature={temperature!r} is not valid; allowed: a number from 0 to 10")
    params = {
        "temperature": temperature,
        "max_new_tokens": _whole(body, "max_tokens", 1, MAX_TOKENS) or 256,
        "custom_params": {"idlm_trace": True},
    }
    stride, seed = _whole(body, "stride", 1, max_stride), _whole(body, "seed", 0, _MAX_SEED)
    if stride is not None:
        params["custom_params"]["idlm_stride"] = stride
    if seed is not None:
        params["sampling_seed"] = seed
    return {"prompt": prompt, "mode": mode, "sampling_params": params}


def _whole(body: dict, name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high):
        raise Mistake(f"{name}={value!r} is not valid; allowed: an integer from {low} to {high}")
    return value
