"""A step of many requests, some of them at a time, so that what it needs beside its logits stays bounded.

Sampling takes several times the memory of the logits it is from: probabilities, noise, their order. Requests know nothing of each other, so a step of all is
those of its parts behind one another.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch

# Logits that go through at a time. At 64 requests, stride 4 and 151,936 tokens it is two parts.
CELLS = 1 << 26


def parts(batch: int, cells: int) -> Iterator[slice]:
    """Slices of ``batch`` requests that have ``cells`` logits each, of about equal size: :data:`CELLS` at most, but one request."""
    most = max(CELLS // max(cells, 1), 1)
    size = max(-(-batch // max(-(-batch // most), 1)), 1)
    return (slice(first, min(first + size, batch)) for first in range(0, batch, size))


def in_parts(step: Callable[..., Any], logits: torch.Tensor, *args: Any, **more: Any) -> Any:
    """``step(logits, *args, **more)`` of some requests at a time.

    Args:
        step: gives a dataclass of tensors, dataclasses and None, requests being the first dimension of every tensor.
        logits: ``(B, R, V)``.
        args, more: tensors, which begin with B, too; what has ``at`` and is asked for its part; anything else is handed on as it is.
    """
    batch, rows, vocab = logits.shape
    found = list(parts(batch, rows * vocab))
    if len(found) <= 1:
        return step(logits, *args, **more)
    return _joined([step(logits[part], *(_of(arg, part) for arg in args), **{name: _of(arg, part) for name, arg in more.items()}) for part in found])


def _of(arg: Any, part: slice) -> Any:
    if isinstance(arg, torch.Tensor):
        return arg[part]
    return arg.at(part) if hasattr(arg, "at") else arg


def _joined(found: list) -> Any:
    first = found[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(found)
    if is_dataclass(first):
        return type(first)(**{field.name: _joined([getattr(one, field.name) for one in found]) for field in fields(first)})
    return first
