"""Small tensors from the host to the device, without waiting."""

import torch


def on_device(host: torch.Tensor, device) -> torch.Tensor:
    """``host`` on ``device``, copied without waiting for it."""
    on_gpu = torch.device(device).type == "cuda"
    return (host.pin_memory() if on_gpu else host).to(device, non_blocking=True)
