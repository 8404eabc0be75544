"""Packed weights give the plain product, and never outlive the weight they were made from."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from torch import nn

from idlm_sglang.compat.start import packed_anew
from idlm_sglang.platform import linear
from tests.bfloat16 import same_bits


class Layer(nn.Module):
    def __init__(self, method, inputs, outputs, dtype=torch.float32):
        super().__init__()
        self.quant_method = method
        self.weight = nn.Parameter(torch.randn(outputs, inputs).to(dtype), requires_grad=False)


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = self.lm_head = Layer(UnquantizedEmbeddingMethod(), 48, 90, dtype)
        self.proj = Layer(UnquantizedLinearMethod(), 48, 33, dtype)
        self.input_only = Layer(UnquantizedEmbeddingMethod(), 48, 90, dtype)


DTYPES = [torch.float32, *([torch.bfloat16] if linear.multiplies_bfloat16() else [])]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def model(dtype):
    torch.manual_seed(0)
    found = Model(dtype)
    head = 90 if dtype == torch.float32 else 0
    assert linear.pack_weights(found) == (head + 33) * 48 * dtype.itemsize
    assert type(found.lm_head.quant_method) is (linear.PackedEmbeddingMethod if head else UnquantizedEmbeddingMethod)
    return found


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (7,), (17,), (3, 11), (64,), (301,)], ids=str)
def test_the_product_is_the_plain_one(model, dtype, shape):
    x, bias = torch.randn(*shape, 48, dtype=dtype), torch.randn(33, dtype=dtype)
    bounds = {"atol": 3e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 2**-8}
    for layer, b in ((model.proj, bias), (model.proj, None), (model.lm_head, None)):
        exact = x.double() @ layer.weight.double().T + (0 if b is None else b)
        torch.testing.assert_close(layer.quant_method.apply(layer, x, b).double(), exact, **bounds)
    tokens = torch.tensor([3, 89])
    assert torch.equal(model.lm_head.quant_method.embedding(model.lm_head, tokens), model.lm_head.weight[tokens])


@torch.inference_mode()
def test_rows_behind_those_of_a_product_are_nobodys(model, dtype):
    x = torch.randn(17, 48, dtype=dtype)
    plain = model.proj.quant_method.apply(model.proj, x)
    model.proj.quant_method.apply(model.proj, torch.full((20, 48), float("nan"), dtype=dtype)[:19])
    assert torch.equal(model.proj.quant_method.apply(model.proj, x), plain)


def test_what_is_of_another_dtype_leaves_the_others_rows_alone(model, dtype):
    for other in {torch.float32, torch.bfloat16, torch.float64} - {dtype}:
        with pytest.raises(RuntimeError):
            model.proj.quant_method.apply(model.proj, torch.zeros(17, 48, dtype=other))
    x = torch.randn(17, 48, dtype=dtype)
    model.proj.quant_method.apply(model.proj, x.clone().requires_grad_())
    assert not model.proj.quant_method.apply(model.proj, x).requires_grad


@torch.inference_mode()
def test_prompts_of_any_length_meet_few_kernels_the_small_ones_from_the_start(monkeypatch):
    run, product = set(), linear._product
    monkeypatch.setattr(linear, "_PREPARING", float("inf"))
    monkeypatch.setattr(linear, "_product", lambda x, packed, bias: run.add((len(x), packed)) or product(x, packed, bias))
    found = Model()
    linear.pack_weights(found)
    prepared = {rows for rows, _ in run}
    assert len(run) == 2 * len(prepared), "each of the two shapes"
    for rows in range(2, 4097):
        found.proj.quant_method.apply(found.proj, torch.zeros(rows, 48))
        if rows == 1024:
            assert {rows for rows, _ in run} == prepared
    assert len({rows for rows, _ in run}) == 123
    run.clear()
    monkeypatch.setattr(linear, "_PREPARING", 0.0)
    linear.pack_weights(Model())
    assert not run, "the start does not wait for them beyond its time"
    assert all(linear.rows_run(n) <= max(n + 3, n * 17 / 16) for n in range(1, 9000))


@torch.inference_mode()
def test_new_weights_are_used_during_and_after_an_update(model, dtype):
    layer, x = model.proj, torch.randn(5, 48, dtype=dtype)
    # The order in which SGLang's loaders call.
    layer.quant_method.restore_weights_before_loading(layer)
    layer.weight.data.copy_(torch.randn(33, 48))
    torch.testing.assert_close(layer.quant_method.apply(layer, x), x @ layer.weight.T)
    layer.quant_method.process_weights_after_loading(layer)
    torch.testing.assert_close(layer.quant_method.apply(layer, x), x @ layer.weight.T)


@torch.inference_mode()
def test_an_update_in_place_is_followed_but_not_in_the_middle_of_one_in_parts(model, dtype):
    layer, x = model.proj, torch.randn(5, 48, dtype=dtype)
    updater = SimpleNamespace(get_model=lambda: model)
    layer.weight.data.copy_(torch.randn(33, 48))
    assert not torch.allclose(layer.quant_method.apply(layer, x), x @ layer.weight.T)
    packed_anew((True, "Success"), updater, [])
    torch.testing.assert_close(layer.quant_method.apply(layer, x), x @ layer.weight.T)
    layer.quant_method.restore_weights_before_loading(layer)
    packed_anew((True, "Success"), updater, [])
    assert layer.idlm_packed is None


@same_bits
@torch.inference_mode()
@pytest.mark.parametrize("widths", [(256, 512), (256, 1024), (512, 256)], ids=str)
def test_a_bfloat16_row_is_the_same_bits_beside_any_others(widths):
    """A strided step multiplies a token's row beside drafts' and other requests'. AR multiplies it alone."""
    torch.manual_seed(0)
    layer = Layer(linear.PackedLinearMethod(), *widths, torch.bfloat16)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(300, widths[0], dtype=torch.bfloat16)
    whole = layer.quant_method.apply(layer, x)
    for rows in (1, 2, 3, 5, 8, 15, 16, 17, 28, 31, 60, 64, 120, 248):
        assert torch.equal(layer.quant_method.apply(layer, x[:rows].clone()), whole[:rows])
        assert torch.equal(layer.quant_method.apply(layer, x[-rows:].clone()), whole[-rows:])


def test_what_is_not_plain_or_too_large_keeps_its_method(model, monkeypatch):
    assert type(model.input_only.quant_method) is UnquantizedEmbeddingMethod
    half = Model(torch.float16)
    assert linear.pack_weights(half) == 0 and type(half.proj.quant_method) is UnquantizedLinearMethod
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    brain = Model(torch.bfloat16)
    assert linear.pack_weights(brain) == 0 and type(brain.proj.quant_method) is UnquantizedLinearMethod
    taken = Model()
    taken.proj.use_intel_amx_backend = True
    linear.pack_weights(taken)
    assert type(taken.proj.quant_method) is UnquantizedLinearMethod
    large = Model()
    monkeypatch.setattr(linear, "PACKED_BYTES", 1000)
    assert linear.pack_weights(large) == 0 and type(large.proj.quant_method) is UnquantizedLinearMethod
