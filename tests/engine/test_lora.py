"""The gated adapter: base rows bit for bit the base's, MASK rows what PEFT computes, on SGLang's own linear layers."""

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from sglang.srt.layers import linear
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from idlm_sglang.engine import lora
from idlm_sglang.isd.layout import mask_rows
from idlm_sglang.platform.linear import pack_weights
from tests import published

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKED = pytest.param(True, marks=pytest.mark.skipif(DEVICE != "cpu", reason="weights are packed on a CPU alone"))
CONFIG = Qwen3Config(vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
# Layer of SGLang's: the modules that it merges, and how they shard.
LAYERS = {
    ("self_attn", "qkv_proj"): ("q_proj", "k_proj", "v_proj"),
    ("self_attn", "o_proj"): ("o_proj",),
    ("mlp", "gate_up_proj"): ("gate_proj", "up_proj"),
    ("mlp", "down_proj"): ("down_proj",),
}


@pytest.fixture(autouse=True, scope="module")
def on_the_device():
    with torch.device(DEVICE):
        yield


def sglang_layers(original, group):
    """The linear layers of SGLang's Qwen3 as one rank holds them, with the weights of ``original``; and what was made for it."""
    c, made = original.config, []
    heads = {"head_size": c.head_dim, "total_num_heads": c.num_attention_heads, "total_num_kv_heads": c.num_key_value_heads}
    h, f, q, no = c.hidden_size, c.intermediate_size, c.head_dim * c.num_attention_heads, {"bias": False, "params_dtype": c.dtype}
    for layer in original.model.layers:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear, "_resolve_linear_group", lambda _: group)
            attention = {"qkv_proj": linear.QKVParallelLinear(h, **heads, **no), "o_proj": linear.RowParallelLinear(q, h, **no, reduce_results=False)}
            mlp = {"gate_up_proj": linear.MergedColumnParallelLinear(h, [f, f], **no), "down_proj": linear.RowParallelLinear(f, h, **no, reduce_results=False)}
        blocks = {"self_attn": attention, "mlp": mlp}
        for (block, name), modules in LAYERS.items():
            own = blocks[block][name]
            for i, module in enumerate(modules):
                weight = getattr(getattr(layer, block), module).weight.data
                shard = () if len(modules) == 1 else (module[0],) if name == "qkv_proj" else (i,)
                own.weight_loader(own.weight, weight, *shard)
        made.append(nn.ModuleDict({block: nn.ModuleDict(layers) for block, layers in blocks.items()}))
    return made


class Model(nn.Module):
    """As much of SGLang's model as the adapter looks at."""

    def __init__(self, original, group=None):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for found in sglang_layers(original, group):
            layer = nn.Module()
            for block, layers in found.items():
                setattr(layer, block, nn.Module())
                for name, own in layers.items():
                    setattr(getattr(layer, block), name, own)
            self.model.layers.append(layer)

    def each(self):
        """(layer, block, name, SGLang's layer) of every linear layer."""
        for i, layer in enumerate(self.model.layers):
            for block, name in LAYERS:
                yield i, block, name, getattr(getattr(layer, block), name)


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(CONFIG).eval()


@pytest.fixture(scope="module")
def adapted(original, tmp_path_factory):
    """(PEFT's model with random A and B, directory that PEFT saved it in)."""
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=5, lora_alpha=8, use_rslora=True, target_modules=[m for modules in LAYERS.values() for m in modules])
    model = peft.get_peft_model(copy.deepcopy(original), settings).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    where = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(where)
    return model, str(where)


def attached(original, adapted, group=None, packed=False):
    model = Model(original, group)
    if packed:
        pack_weights(model)
    gate = lora.attach(model, adapted[1], original.config, original.dtype, DEVICE)
    gate.reserve(256, DEVICE)
    return model, gate


def product(own, x):
    """What a layer's forward multiplies, before any all-reduce."""
    return own.quant_method.apply(own, x)


def peft_output(peft_model, i, block, modules, x):
    owner = getattr(peft_model.base_model.model.model.layers[i], block)
    return torch.cat([getattr(owner, module)(x) for module in modules], dim=1)


def check_rows(base, gated, wanted, rows, atol=2e-5, rtol=1e-5):
    """Rows outside ``rows`` are the base's bit for bit, those inside are what PEFT computes."""
    outside = torch.ones(len(base), dtype=torch.bool)
    outside[rows] = False
    assert torch.equal(base[outside], gated[outside]), "a row that is no MASK row was changed"
    torch.testing.assert_close(gated[rows], wanted[rows], atol=atol, rtol=rtol)


def step_rows(seed):
    """MASK rows of a random step: (row numbers, drafts of each request, K)."""
    g = torch.Generator("cpu").manual_seed(seed)
    size, k = (int(torch.randint(1, high, (), generator=g, device="cpu")) for high in (9, 8))
    counts = torch.randint(0, k + 1, (size,), generator=g, device="cpu").to(DEVICE)
    return (torch.arange(size)[:, None] * (2 * k + 1) + mask_rows(counts, k)).flatten(), counts, k


@torch.inference_mode()
@pytest.mark.parametrize("packed", [False, PACKED])
def test_base_rows_are_untouched_and_mask_rows_are_peft_s(original, adapted, packed):
    model, gate = attached(original, adapted, packed=packed)
    checked = 0
    for seed in range(25):
        rows, counts, k = step_rows(seed)
        for i, block, name, own in model.each():
            x = torch.randn(len(counts) * (2 * k + 1), own.input_size) * 3
            base = product(own, x)
            with gate.masks(counts, k):
                assert torch.equal(gate.rows, rows)
                gated = product(own, x)
            check_rows(base, gated, peft_output(adapted[0], i, block, LAYERS[block, name], x), rows)
            assert torch.equal(product(own, x), base), "the adapter outlived its forward"
            checked += len(rows)
    print(f"{checked} gated rows equal PEFT's; every other row bit-identical")


@torch.inference_mode()
def test_base_rows_are_untouched_at_the_published_dimensions(tmp_path):
    """Width 4096, rank 128, bf16: one layer of Qwen3-8B under an adapter as PEFT writes it."""
    torch.manual_seed(2)
    sizes = {k: published.BASE_CONFIG[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")}
    original = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, num_hidden_layers=1, dtype=torch.bfloat16, **sizes)).to(torch.bfloat16)
    settings = peft.LoraConfig(r=published.RANK, target_modules=published.MODULES, init_lora_weights=False)
    adapted = peft.get_peft_model(original, settings, autocast_adapter_dtype=False).eval()
    adapted.save_pretrained(tmp_path)
    model, gate = attached(original, (adapted, str(tmp_path)))
    for seed in range(2):
        rows, counts, k = step_rows(seed)
        for i, block, name, own in model.each():
            x = torch.randn(len(counts) * (2 * k + 1), own.input_size, dtype=torch.bfloat16)
            base = product(own, x)
            with gate.masks(counts, k):
                gated = product(own, x)
            # Two roundings to eight bits more or fewer than PEFT's, of sums of about 1.
            check_rows(base, gated, peft_output(adapted, i, block, LAYERS[block, name], x), rows, atol=0.05, rtol=0.02)
            assert not torch.equal(base[rows], gated[rows])


def test_a_step_in_a_prompt_s_forward_is_gated_where_its_rows_stand():
    """Behind ten rows of prompts, two of which are MASK rows behind a prompt."""
    gate = lora.Gate(adapted=True)
    gate.reserve(64, DEVICE)
    rows, counts, k = step_rows(5)
    with gate.masks(counts, k, 10, torch.tensor([4, 5])):
        assert gate.rows.tolist() == [4, 5, *(10 + rows).tolist()]
    with gate.on(torch.zeros(0, dtype=torch.int64)):
        assert gate.rows is None


@torch.inference_mode()
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_base_rows_hold_whatever_the_adapter_yields(original, adapted, value):
    model, gate = attached(original, adapted)
    rows = torch.tensor([1, 3, 4])
    for *_, own in model.each():
        x = torch.randn(7, own.input_size)
        base = product(own, x)
        own.idlm_lora.a.fill_(value)
        with gate.on(rows):
            gated = product(own, x)
        outside = torch.tensor([0, 2, 5, 6])
        assert torch.equal(base[outside], gated[outside]) and not torch.equal(base[rows], gated[rows])


@torch.inference_mode()
def test_an_adapter_on_every_row_as_stock_peft_has_it_is_caught(original, adapted):
    model, gate = attached(original, adapted)
    rows, counts, k = step_rows(3)
    for i, block, name, own in model.each():
        x = torch.randn(len(counts) * (2 * k + 1), own.input_size)
        base, wanted = product(own, x), peft_output(adapted[0], i, block, LAYERS[block, name], x)
        with gate.on(torch.arange(len(x))):
            everywhere = product(own, x)
        for output in (everywhere, wanted):
            with pytest.raises(AssertionError, match="no MASK row"):
                check_rows(base, output, wanted, rows)


@torch.inference_mode()
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_hold_shares_that_add_up(original, adapted, size):
    """Column-parallel outputs side by side, KV heads repeated where there are fewer than ranks; row-parallel ones summed."""
    ranks = [attached(original, adapted, SimpleNamespace(rank_in_group=rank, world_size=size)) for rank in range(size)]
    rows = torch.tensor([0, 2, 5])
    for places in zip(*(model.each() for model, _ in ranks)):
        i, block, name, own = places[0]
        parts = LAYERS[block, name]
        full = own.input_size
        x = torch.randn(6, full)
        outputs = []
        for rank, (_, _, _, layer) in enumerate(places):
            mine = x if len(parts) > 1 else x.chunk(size, 1)[rank]
            with ranks[rank][1].on(rows):
                outputs.append(product(layer, mine))
        wanted = peft_output(adapted[0], i, block, parts, x)
        if len(parts) == 1:
            torch.testing.assert_close(sum(outputs)[rows], wanted[rows], atol=2e-5, rtol=1e-5)
            continue
        widths = [getattr(getattr(original.model.layers[i], block), part).out_features for part in parts]
        for j, part in enumerate(wanted.split(widths, 1)):
            held = [output.split(places[rank][3].output_partition_sizes, 1)[j] for rank, output in enumerate(outputs)]
            repeats = size * held[0].shape[1] // part.shape[1]
            torch.testing.assert_close(torch.cat(held[::repeats], 1)[rows], part[rows], atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_modules_that_the_adapter_leaves_out_stay_the_base_s(original, tmp_path):
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(original), settings).eval()
    model.save_pretrained(tmp_path)
    own, gate = attached(original, (model, str(tmp_path)))
    rows = torch.tensor([1, 4])
    for i, block, name, layer in own.each():
        x = torch.randn(6, layer.input_size)
        base = product(layer, x)
        with gate.on(rows):
            gated = product(layer, x)
        check_rows(base, gated, peft_output(model, i, block, LAYERS[block, name], x), rows)
        assert (name == "qkv_proj") != torch.equal(base, gated)


@torch.inference_mode()
def test_without_an_adapter_nothing_is_wrapped(original):
    model = Model(original)
    gate = lora.attach(model, None, CONFIG, torch.float32, DEVICE)
    with gate.masks(torch.tensor([1]), 2), gate.on(torch.tensor([1])):
        assert gate.rows is None
    assert not any(hasattr(own.quant_method, "idlm_gate") for *_, own in model.each())


@torch.inference_mode()
@pytest.mark.skipif(DEVICE != "cpu", reason="weights are packed on a CPU alone")
def test_weights_packed_anew_are_used_under_the_adapter(original, adapted):
    """New base weights in place, as SGLang's updaters leave them: the gated layer multiplies by those."""
    from idlm_sglang.platform.linear import pack_again

    model, gate = attached(original, adapted, packed=True)
    *_, own = next(model.each())
    x = torch.randn(5, own.input_size)
    before = product(own, x)
    own.weight.data.mul_(2)
    pack_again(model)
    torch.testing.assert_close(product(own, x), 2 * before)
    rows = torch.tensor([4])
    with gate.on(rows):
        gated = product(own, x)
    assert torch.equal(gated[:4], product(own, x)[:4])


def test_a_fused_kernel_and_a_captured_prefill_are_left_aside_while_the_gate_is_on():
    gate, runner = lora.Gate(adapted=True), SimpleNamespace(can_run_graph=lambda batch: True)
    gate.reserve(4, DEVICE)
    gate.keep_eager(runner)
    assert runner.can_run_graph(None)
    with gate.on(torch.tensor([0])):
        assert not runner.can_run_graph(None)
    assert runner.can_run_graph(None)
