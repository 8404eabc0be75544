"""The device this process would serve on, in words."""

import os

import torch


def device_name(device: str = "cuda") -> str:
    """For example "2 x NVIDIA H200, 139 GiB each" or "CPU, 2 cores"."""
    if device.startswith("cuda") and torch.cuda.is_available():
        first = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        each = " each" if count > 1 else ""
        return f"{f'{count} x ' if count > 1 else ''}{first.name}, {first.total_memory / 2**30:.0f} GiB{each}"
    if device == "cpu" or not torch.cuda.is_available():
        return f"CPU, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    return device
