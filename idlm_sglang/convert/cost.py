"""What a training will cost, by formula: an estimate, before anything was measured."""

import torch

_TFLOPS = {"B200": 2250, "GH200": 989, "H200": 989, "H100": 989, "A100": 312, "L40S": 362}  # dense bf16, of the makers' data sheets
_USED = 0.4  # share of that figure: an assumption


def estimate(frozen: int, trained: int, frozen_bytes: int, tokens: int, device: torch.device, tflops: float | None) -> str:
    """One line: 6 x parameters x tokens FLOPs over the device's figure, and the memory of what does not depend on the batch.

    frozen: parameters of `frozen_bytes` each. trained: fp32 parameters with a gradient and the two moments of AdamW. tokens: of the whole
    training, MASKs included.
    """
    parameters = frozen + trained
    flops = 6 * parameters * tokens
    gigabytes = (frozen * frozen_bytes + trained * 16) / 1e9
    if tflops is None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        tflops = next((figure for part, figure in _TFLOPS.items() if part in name), None)
    time = "no figure of this device is known (--tflops)"
    if tflops:
        hours = flops / (tflops * 1e12 * _USED) / 3600
        time = f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
        time += f" at {_USED:.0%} of {tflops:g} TFLOP/s"
    return (f"estimate, not measured: 6 x {parameters / 1e6:,.1f} M parameters x {tokens / 1e6:,.1f} M tokens = {flops:.1e} FLOP, {time}; "
            f"{gigabytes:,.1f} GB for weights, gradients and optimizer")
