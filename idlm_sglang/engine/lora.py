"""Gated LoRA (R-ISD): an adapter that acts on the rows that play the MASK role, and on no other, in the same forward.

Pending, draft and prompt rows run the base weights, so p, what is committed and the KV cache are the base model's own. The
gate goes by a row's role in the step (:mod:`idlm_sglang.isd.layout`), never by its token: a MASK in a prompt is base.

Gated rows are gathered, ``scaling * B (A x)`` is computed for them alone, and added to them in place. The other rows of a
layer's output are not written, so they are the base forward's bit for bit. (What an adapter makes infinite or NaN in a MASK
row's K and V would reach other rows through attention, as 0 x NaN; weights that are not finite are refused.) The sum is formed before any
all-reduce, on the layer's local output, behind whichever kernel multiplies the (perhaps quantised) base weight.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sglang.srt.distributed.utils import get_group_rank_size
from torch import nn

from idlm_sglang.adapter import Adapter, pairs, read_adapter
from idlm_sglang.isd.layout import mask_rows

logger = logging.getLogger(__name__)

# SGLang's merged layers: what a module's rows are a part of, and which.
_PLACES = {
    "q_proj": ("self_attn", "qkv_proj", 0),
    "k_proj": ("self_attn", "qkv_proj", 1),
    "v_proj": ("self_attn", "qkv_proj", 2),
    "o_proj": ("self_attn", "o_proj", None),
    "gate_proj": ("mlp", "gate_up_proj", 0),
    "up_proj": ("mlp", "gate_up_proj", 1),
    "down_proj": ("mlp", "down_proj", None),
}


class Gate:
    """Which rows of the running forward the adapter acts on; one for all of a model's layers.

    Attributes:
        rows: ``(R,)`` int64 row numbers on the device, each once, or None: the adapter is left out. A view of one buffer, and
            ``R = B (N - 1)`` follows from batch size and stride: what a CUDA graph of that size has captured stays valid.
    """

    def __init__(self, adapted: bool = False):
        self.adapted = adapted
        self.rows: torch.Tensor | None = None
        self._buffer: torch.Tensor | None = None
        self._cold: dict[int, torch.Tensor] = {}

    def reserve(self, rows: int, device) -> None:
        """Room for the most rows that a forward gates."""
        if self.adapted:
            self._buffer = torch.zeros(max(rows, 1), dtype=torch.int64, device=device)

    @contextmanager
    def on(self, rows: torch.Tensor) -> Iterator[None]:
        """In here forwards add the adapter at these rows (any shape, int64, on the device). Nothing waits for the device."""
        if not self.adapted or not rows.numel():
            yield
            return
        self.rows = self._buffer[: rows.numel()].copy_(rows.reshape(-1))
        try:
            yield
        finally:
            self.rows = None

    def masks(self, counts: torch.Tensor, k: int, first: int = 0, others: torch.Tensor | None = None, places=None):
        """:meth:`on` for the MASK rows of a decode step.

        Args:
            counts: ``(B,)`` integer drafts of each request, behind which its K MASK rows stand.
            k: K; each request has 2K + 1 rows.
            first: row of the forward at which the step begins.
            others: ``(n,)`` int64 further rows.
            places: from row numbers ``(n,)`` of the step to those among its rows in the forward, where not all of them are in it.
        """
        if not self.adapted:
            return self.on(counts)
        # What does not depend on the drafts is kept: a step then takes one sum and one copy.
        if k not in self._cold or len(self._cold[k]) < len(counts):
            self._cold[k] = self.padding(len(counts), k, counts.device).view(-1, k)
        rows = self._cold[k][: len(counts)] + counts[:, None]
        rows = rows if places is None else places(rows.flatten())
        rows = rows + first if first else rows
        return self.on(rows if others is None else torch.cat((others, rows.flatten())))

    # For captured forwards (engine.graphs), whose rows are the buffer's first ones, padding requests included.

    @contextmanager
    def on_reserved(self, rows: int) -> Iterator[None]:
        """In here forwards add the adapter at the rows that the buffer's first ``rows`` entries name, whatever these are by then."""
        before = self.rows
        self.rows = self._buffer[:rows] if self.adapted and rows else None
        try:
            yield
        finally:
            self.rows = before

    def padding(self, size: int, k: int, device) -> torch.Tensor:
        """``(size * k,)`` int64: the MASK rows of ``size`` requests without drafts; of none, where nothing is gated."""
        requests = torch.arange(size if self.adapted else 0, device=device)
        return (requests[:, None] * (2 * k + 1) + mask_rows(torch.zeros_like(requests), k)).flatten()

    def put(self, rows: torch.Tensor, first: int) -> None:
        """Write row numbers into the buffer, from entry ``first`` on."""
        if len(rows):
            self._buffer[first : first + len(rows)].copy_(rows)

    def keep_eager(self, runner) -> None:
        """Gated forwards stay out of a prefill graph runner: its graphs were captured without the adapter."""
        if self.adapted and hasattr(runner, "can_run_graph"):
            _only_ungated(self, runner, "can_run_graph")


class LoraLinear:
    """The adapter's share of one linear layer, as this rank holds it.

    Args:
        a: ``(P r, in)``, the A of its P parts, one under the other.
        bs: for each part B ``(out, r)``, scaled; side by side they make up the layer's output.
    """

    def __init__(self, a: torch.Tensor, bs: list[torch.Tensor]):
        self.a, self.bs = a, bs

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + sum(b.nbytes for b in self.bs)

    def add_(self, y: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
        """``y[rows] += B (A x[rows])`` for ``y`` ``(T, out)``, ``x`` ``(T, in)``; the other rows of ``y`` are not touched."""
        hidden = (x.index_select(0, rows) @ self.a.T).chunk(len(self.bs), 1)
        parts = [h @ b.T for h, b in zip(hidden, self.bs)]
        y.index_add_(0, rows, parts[0] if len(parts) == 1 else torch.cat(parts, 1))


def attach(model: nn.Module, path: str | None, config, dtype: torch.dtype, device) -> Gate:
    """Load the adapter in ``path`` into the layers of ``model`` (SGLang's Qwen3, loaded). Returns its gate; without a path, one that does nothing.

    Args:
        config: the base's Hugging Face config.
        dtype: of activations; the adapter is kept in it.

    Raises:
        SettingError: what :mod:`idlm_sglang.adapter` refuses.
    """
    gate = Gate(path is not None)
    if path is None:
        return gate
    adapter, size = read_adapter(path), 0
    for (layer, block, name), sides in _by_layer(adapter, config).items():
        owner = getattr(model.model.layers[layer], block)
        linear = getattr(owner, name)
        linear.idlm_lora = lora = _shard(linear, sides, adapter.scaling, dtype, device)
        size += lora.nbytes
        _gate_method(gate, linear.quant_method)
        if hasattr(owner, "dual_gemm"):  # a fused kernel over both projections, which asks no layer
            _only_ungated(gate, owner.dual_gemm, "can_run")
    logger.info("idlm: adapter %s, rank %d, scaling %.3g, at the MASK rows alone; %.1f MB here", adapter.path, adapter.rank, adapter.scaling, size / 2**20)
    return gate


def _by_layer(adapter: Adapter, config) -> dict[tuple[int, str, str], dict[int | None, tuple[torch.Tensor, torch.Tensor]]]:
    """By (layer, block, SGLang's linear layer): A and B of each part."""
    found: dict = {}
    for layer, module, a, b in pairs(adapter, config):
        block, name, part = _PLACES[module]
        found.setdefault((layer, block, name), {})[part] = a, b
    return found


def _shard(linear: nn.Module, sides: dict, scaling: float, dtype: torch.dtype, device) -> LoraLinear:
    """This rank's share: column-parallel layers split B by rows, as their weight; row-parallel ones split A by columns."""

    def here(weight: torch.Tensor) -> torch.Tensor:
        return weight.to(device=device, dtype=dtype).contiguous()

    rank, size = get_group_rank_size(linear.tp_group)
    if None in sides:
        a, b = sides[None]
        inside = linear.input_size_per_partition
        return LoraLinear(here(a[:, rank * inside : (rank + 1) * inside]), [here(b.float() * scaling)])
    some, _ = next(iter(sides.values()))
    as_, bs = [], []
    for part, width in enumerate(linear.output_partition_sizes):
        # Parts that are not adapted get zeros, so that all are added at once.
        a, b = sides.get(part) or (torch.zeros_like(some), torch.zeros(width * size, len(some)))
        # KV heads are repeated where there are fewer of them than ranks.
        shard = rank // (width * size // len(b))
        as_.append(a)
        bs.append(here(b[shard * width : (shard + 1) * width].float() * scaling))
    return LoraLinear(here(torch.cat(as_)), bs)


def _gate_method(gate: Gate, method) -> None:
    """Add a layer's adapter behind its multiplication. The method object stays: SGLang compares it, and reloads weights through it."""
    if hasattr(method, "idlm_gate"):
        return
    multiply, method.idlm_gate = method.apply, gate

    def apply(layer, x, *args, **kwargs):
        y = multiply(layer, x, *args, **kwargs)
        if gate.rows is not None and hasattr(layer, "idlm_lora"):
            layer.idlm_lora.add_(y, x, gate.rows)
        return y

    method.apply = apply


def _only_ungated(gate: Gate, owner, name: str) -> None:
    """``owner.name(..)`` answers False while the gate is on."""
    asked = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: gate.rows is None and asked(*args, **kwargs))
