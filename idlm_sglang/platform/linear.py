"""Matrix products of the CPU platform, float32 and bfloat16: weights packed once for oneDNN.

In float32 ``F.linear`` takes MKL's GEMM, which leaves AVX-512 aside on processors that are not Intel's and packs the weight anew in
every call. oneDNN does neither. A single row stays a matrix-vector product of MKL, the faster one there. In bfloat16 ``F.linear`` takes oneDNN's
kernels already, and packs in every call as well; processors without bfloat16 instructions keep it.

oneDNN compiles a kernel for each number of rows it meets, which takes several times as long as the product, and forgets the oldest of 1,024. Forwards that take prompts
along have any number of rows. So the rows are filled up to one of few numbers (:func:`rows_run`), and the kernels of the smaller ones are compiled at start.

SGLang calls ``restore_weights_before_loading`` and ``process_weights_after_loading`` around an update of the weights from disk or in
several parts; behind the others ``compat`` calls :func:`pack_again`. So the packed copy never outlives the weight it was made from.
"""

import time

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from torch import nn
from torch.nn.functional import linear

# Packed copies double the memory of the weights. A checkpoint beyond this many bytes keeps the plain product.
PACKED_BYTES = 1 << 30
# At start kernels are compiled for so many rows, the fewest first, as far as they come in so many seconds.
_PREPARED_ROWS, _PREPARING = 1_024, 2.0

_padded: dict[tuple[int, torch.dtype], torch.Tensor] = {}  # by width: rows that a product runs on


def rows_run(rows: int) -> int:
    """How many rows a product of ``rows`` runs on: at most a sixteenth more, or 3. There are 124 such numbers up to 4,096."""
    step = 1 if rows <= 16 else max((1 << (rows - 1).bit_length()) >> 5, 4)
    return -(-rows // step) * step


def _filled_up(x: torch.Tensor, rows: int) -> torch.Tensor:
    """``x`` ``(n, in)`` and rows of whatever behind it, ``(rows, in)``; valid until the next call for the same width and dtype."""
    width, dtype = x.shape[1], x.dtype
    buffer = _padded.get((width, dtype))
    if buffer is None or buffer.shape[0] < rows:
        # Written inside and outside inference mode alike, so it must not be an inference tensor.
        with torch.inference_mode(False):
            buffer = _padded[width, dtype] = torch.zeros(max(rows, _PREPARED_ROWS), width, dtype=dtype, device="cpu")
    filled = buffer[:rows]
    filled[: x.shape[0]] = x.detach()
    return filled


def _product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class _Packed:
    """What both methods share. The copy lies beside ``layer.weight``, which stays as SGLang loads it."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.idlm_packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())

    def restore_weights_before_loading(self, layer: nn.Module) -> None:
        layer.idlm_packed = None

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ weight.T + bias`` for ``x`` ``(.., in)`` of the weight's dtype."""
        rows, dtype = x.numel() // x.shape[-1], x.dtype
        if layer.idlm_packed is None or rows <= (dtype == torch.float32):
            return linear(x, layer.weight, bias)
        run = rows_run(rows)
        if run == rows or dtype != layer.weight.dtype:
            return _product(x, layer.idlm_packed, bias)
        out = _product(_filled_up(x.reshape(rows, -1), run), layer.idlm_packed, bias)
        return out[:rows].view(*x.shape[:-1], -1)


class PackedLinearMethod(_Packed, UnquantizedLinearMethod):
    """For linear layers."""


class PackedEmbeddingMethod(_Packed, UnquantizedEmbeddingMethod):
    """For the LM head, whether it shares its weight with the input embedding or not."""


_REPLACED = {UnquantizedLinearMethod: PackedLinearMethod, UnquantizedEmbeddingMethod: PackedEmbeddingMethod}


def pack_weights(model: nn.Module) -> int:
    """Replace the methods of the model's plain layers, if all of them fit into PACKED_BYTES. Returns the bytes packed.

    A bfloat16 LM head keeps its own: SGLang computes it in float32 where it is asked to, by the name of the method.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    head = getattr(model, "lm_head", None)
    layers = [m for m in model.modules() if _is_plain(m) and (m is head and m.weight.dtype == torch.float32 or type(m.quant_method) is UnquantizedLinearMethod)]
    total = sum(layer.weight.nbytes for layer in layers)
    if total > PACKED_BYTES:
        return 0
    for layer in layers:
        layer.quant_method = _REPLACED[type(layer.quant_method)]()
        layer.quant_method.process_weights_after_loading(layer)
    _compile(layers)
    return total


@torch.inference_mode()
def _compile(layers: list[nn.Module]) -> None:
    """Run each shape of the layers' products once for the numbers of rows that a server of short prompts meets."""
    end = time.perf_counter() + _PREPARING
    # oneDNN has another kernel where a bias is added.
    shapes = list({(layer.weight.shape, getattr(layer, "bias", None) is None): layer for layer in layers}.values())
    for rows in sorted({rows_run(n) for n in range(1, _PREPARED_ROWS + 1)}):
        for layer in shapes:
            if time.perf_counter() > end:
                return
            layer.quant_method.apply(layer, layer.weight.new_zeros(rows, layer.weight.shape[1]), getattr(layer, "bias", None))


def pack_again(model: nn.Module) -> None:
    """Packed copies of the weights as they are now, where a layer has one; in the middle of an update none has."""
    for layer in model.modules():
        if getattr(layer, "idlm_packed", None) is not None:
            layer.quant_method.process_weights_after_loading(layer)


def _is_plain(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if getattr(module, "use_intel_amx_backend", False):  # SGLang's own kernels have laid the weight out already
        return False
    return type(getattr(module, "quant_method", None)) in _REPLACED and weight is not None and _is_packed(weight.dtype)


def _is_packed(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or dtype == torch.bfloat16 and multiplies_bfloat16()


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16."""
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))
