"""float32 matrix products of the CPU platform: weights packed once for oneDNN.

``F.linear`` takes MKL's GEMM, which leaves AVX-512 aside on processors that are not Intel's and packs the weight anew in every
call. oneDNN does neither. A single row stays a matrix-vector product of MKL, the faster one there.

SGLang calls ``restore_weights_before_loading`` and ``process_weights_after_loading`` around an update of the weights from disk or in
several parts; behind the others ``compat`` calls :func:`pack_again`. So the packed copy never outlives the weight it was made from.
"""

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from torch import nn
from torch.nn.functional import linear

# Packed copies double the memory of the weights. A checkpoint beyond this many bytes keeps the plain product.
PACKED_BYTES = 1 << 30


class _Packed:
    """What both methods share. The copy lies beside ``layer.weight``, which stays as SGLang loads it."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.idlm_packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())

    def restore_weights_before_loading(self, layer: nn.Module) -> None:
        layer.idlm_packed = None

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ weight.T + bias`` for ``x`` ``(.., in)`` float32."""
        if layer.idlm_packed is None or x.numel() == x.shape[-1]:
            return linear(x, layer.weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, layer.idlm_packed, bias, "none", [], "")


class PackedLinearMethod(_Packed, UnquantizedLinearMethod):
    """For linear layers."""


class PackedEmbeddingMethod(_Packed, UnquantizedEmbeddingMethod):
    """For the LM head, whether it shares its weight with the input embedding or not."""


_REPLACED = {UnquantizedLinearMethod: PackedLinearMethod, UnquantizedEmbeddingMethod: PackedEmbeddingMethod}


def pack_weights(model: nn.Module) -> int:
    """Replace the methods of the model's plain float32 layers, if all of them fit into PACKED_BYTES. Returns the bytes packed."""
    if not torch.backends.mkldnn.is_available():
        return 0
    head = getattr(model, "lm_head", None)
    layers = [m for m in model.modules() if _is_plain(m) and (m is head or type(m.quant_method) is UnquantizedLinearMethod)]
    total = sum(layer.weight.nbytes for layer in layers)
    if total > PACKED_BYTES:
        return 0
    for layer in layers:
        layer.quant_method = _REPLACED[type(layer.quant_method)]()
        layer.quant_method.process_weights_after_loading(layer)
    return total


def pack_again(model: nn.Module) -> None:
    """Packed copies of the weights as they are now, where a layer has one; in the middle of an update none has."""
    for layer in model.modules():
        if getattr(layer, "idlm_packed", None) is not None:
            layer.quant_method.process_weights_after_loading(layer)


def _is_plain(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(getattr(module, "quant_method", None)) in _REPLACED and weight is not None and weight.dtype == torch.float32
