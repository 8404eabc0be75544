"""Seconds of a forward from a model's dimensions, a device's figures, and four fitted overheads.

    decode(N, B) = max(weights / bandwidth, rows x 2 x weights / FLOPs) + KV / bandwidth + all-reduces
                   + host + (N > 1: isd + B x isd_request) + (N = 1 under ISD: the measured overhead)

rows = B (2N - 1); N = 0 stands for AR. Everything but the host's part is divided by TP. All functions take arrays, one entry per set-up.
"""

from dataclasses import dataclass

import numpy as np

from benchmarks.simulate.devices import BF16, Device
from benchmarks.simulate.models import Model

AR = 0

BANDWIDTH_SHARE = 0.85
FLOPS_SHARE = 0.70
"""What kernels achieve of a data sheet's figure. Assumed, not fitted: one device and one model do not tell them from the host's time."""
ALL_REDUCE = 8e-6
"""Seconds before an all-reduce's first byte arrives. Assumed."""
LORA = 1.12
"""The authors' claimed cost of the gated adapter, as a factor on the step."""
MEMORY_SHARE = 0.9
"""Of the device's memory, for weights and KV."""


@dataclass(frozen=True)
class Overheads:
    """What is fitted on the published points, in seconds unless named otherwise.

    Attributes:
        context: thousand tokens in a running request's KV cache, mean over requests and time; no source states it.
        host: of every forward: launches, scheduling, sampling.
        isd: more of it in an ISD step.
        isd_request: more of it for each running request of an ISD step: verification, sampling of 2N - 1 rows, bookkeeping.
    """

    context: float
    host: float
    isd: float
    isd_request: float


@dataclass(frozen=True)
class Setup:
    """What is served on what."""

    model: Model
    device: Device
    tp: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.model.name} {self.dtype} {self.device.name} TP{self.tp}"

    def capacity(self, columns: float) -> int:
        """Requests of ``columns`` tokens each whose KV fits beside the weights; at least 1. KV heads are split over TP."""
        free = self.tp * self.device.memory * MEMORY_SHARE - self.model.bytes_kept(self.dtype)
        return max(1, int(free / (self.model.kv_bytes * columns)))


class Roofline:
    """Step times of several set-ups at once. ``single``: seconds that stride 1 costs over AR; ``single_share``: the same as a share of AR's step."""

    def __init__(self, setups: list[Setup], overheads: Overheads, single: float = 0.0, single_share: float = 0.0):
        def of(value):
            return np.array([value(s) for s in setups], dtype=float)

        self.setups, self.overheads, self.single, self.single_share = setups, overheads, single, single_share
        bandwidth = of(lambda s: s.device.bandwidth * BANDWIDTH_SHARE * s.tp)
        self._read = of(lambda s: s.model.bytes_read(s.dtype)) / bandwidth
        self._column = of(lambda s: s.model.kv_bytes) / bandwidth
        # An LM head in bf16 runs at bf16's rate.
        self._linear_row = of(lambda s: 2 * s.model.linear / (s.device.flops[s.dtype] * FLOPS_SHARE * s.tp))
        self._head_row = of(lambda s: 2 * s.model.lm_head / (s.device.flops[BF16] * FLOPS_SHARE * s.tp))
        # A ring moves 2 (TP - 1) / TP of the bf16 activations, twice a layer and once behind the embedding.
        self._reduces = of(lambda s: 2 * s.model.layers + 1) * (of(lambda s: s.tp) > 1)
        self._reduce_row = of(lambda s: 2 * (s.tp - 1) / s.tp * 2 * s.model.hidden / s.device.link)

    def pick(self, index: int) -> "Roofline":
        """The same for one of the set-ups."""
        return Roofline([self.setups[index]], self.overheads, self.single, self.single_share)

    def decode(self, stride: np.ndarray, running: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Seconds of a decode step. stride: AR (0) or N; running: requests; columns: KV tokens of all of them together."""
        stride, running = np.asarray(stride), np.asarray(running, dtype=float)
        many = stride > 1
        rows = running * np.maximum(2 * stride - 1, 1)
        device = self._forward(rows, rows) + columns * self._column
        host = self.overheads.host + many * (self.overheads.isd + running * self.overheads.isd_request)
        total = device + host
        return total + (stride == 1) * (self.single + self.single_share * total)

    def prefill(self, requests: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Seconds of a prefill of ``requests`` prompts with ``tokens`` tokens together; the LM head sees each prompt's last row."""
        return self._forward(np.asarray(tokens, dtype=float), np.asarray(requests, dtype=float)) + self.overheads.host

    def _forward(self, rows: np.ndarray, head_rows: np.ndarray) -> np.ndarray:
        compute = rows * self._linear_row + head_rows * self._head_row
        return np.maximum(self._read, compute) + self._reduces * (ALL_REDUCE + rows * self._reduce_row)
