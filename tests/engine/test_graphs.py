"""Captured decode forwards: which are captured, who replays what, and that a replay gives what the eager step gives."""

import json
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from idlm_sglang import compat
from idlm_sglang.config import AUTO, BRANCH, CHAIN, OFF, ON, SettingError, Settings
from idlm_sglang.engine import algorithm, graph_sizes
from idlm_sglang.engine.graph_sizes import MOST_ROWS, batch_sizes, captured_strides
from idlm_sglang.engine.graphs import DecodeGraphs, ready
from idlm_sglang.engine.lora import Gate
from idlm_sglang.engine.spec_io import IsdVerifyInput
from tests import beside

# SGLang's list for speculative decoding, up to 256.
STOCK = [*range(1, 9), *range(10, 33, 2), *range(40, 65, 4), *range(72, 257, 8)]


def test_the_strides_with_graphs_are_those_that_serve():
    assert captured_strides(Settings(stride=4, max_stride=4, auto=False)) == (4, 1)
    assert captured_strides(Settings(stride=4, max_stride=8, auto=False)) == (4, 1, 8, 6, 3, 2)
    assert captured_strides(Settings(stride=1, max_stride=1, auto=False)) == (1,)
    assert captured_strides(Settings(stride=4, max_stride=8, auto=True)) == (4, 1, 8, 6, 3, 2)


@pytest.mark.parametrize("width, most", [(1, 64), (7, 64), (7, 256), (15, 256), (31, 64), (31, 5)])
def test_batch_sizes_are_bounded_in_rows_and_number(width, most):
    sizes = batch_sizes(STOCK, False, most, width)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1
    assert sizes[-1] == min(most, MOST_ROWS // width), "the largest batch that fits is captured"
    assert sizes[-1] * width <= MOST_ROWS and len(sizes) <= 24
    worst = max((upper - lower - 1) / (lower + 1) for lower, upper in zip(sizes, sizes[1:])) if len(sizes) > 1 else 0
    print(f"width {width}, {most} requests: {len(sizes)} sizes, at most {worst:.0%} padding")
    assert worst <= 0.25


def test_a_typed_list_is_kept_but_for_what_does_not_fit():
    assert batch_sizes([1, 2, 3, 4, 500], True, 64, 31) == [1, 2, 3, 4, 64]
    assert batch_sizes([3, 5], True, 64, 7) == [3, 5]
    assert batch_sizes([3, 5], True, 2, 7) == [2]
    assert batch_sizes(STOCK, False, 64, MOST_ROWS + 1) == []


class Runner:
    def __init__(self, width):
        self.width, self.bs, self.seen = width, 8, []

    def can_run_graph(self, forward_batch):
        return True

    def execute(self, forward_batch, pp_proxy_tensors=None):
        self.seen.append(forward_batch)
        return self.width


def batch(mode, width=None):
    spec_info = None if width is None else IsdVerifyInput(None, None, width)
    return SimpleNamespace(forward_mode=mode, spec_info=spec_info)


def test_a_forward_goes_to_the_runner_of_its_own_mode_and_width():
    graphs = DecodeGraphs.__new__(DecodeGraphs)
    graphs.runners, graphs.bs = {width: Runner(width) for width in (1, 3, 7)}, None
    for mode, width in [(ForwardMode.DECODE, None), (ForwardMode.TARGET_VERIFY, 7), (ForwardMode.TARGET_VERIFY, 3)]:
        assert graphs.can_run_graph(batch(mode, width)) and graphs.execute(batch(mode, width)) == (width or 1)
    for mode, width in [(ForwardMode.TARGET_VERIFY, 5), (ForwardMode.EXTEND, None), (ForwardMode.MIXED, None), (ForwardMode.IDLE, None)]:
        assert not graphs.can_run_graph(batch(mode, width)), "no runner: eager"
    del graphs.runners[1]
    assert not graphs.can_run_graph(batch(ForwardMode.DECODE)), "a verify runner never takes a single step"


def test_rows_of_padding_requests_take_the_place_of_what_an_earlier_step_left():
    gate, k = Gate(adapted=True), 3
    gate.reserve(64, "cpu")
    padding = gate.padding(4, k, "cpu")
    with gate.masks(torch.tensor([3, 3, 3, 3]), k):
        assert len(gate.rows) == 12
    with gate.masks(torch.tensor([0, 2]), k):
        own = gate.rows.tolist()
        gate.put(padding[len(own) :], len(own))
        with gate.on_reserved(4 * k):
            rows = gate.rows.tolist()
        assert gate.rows.tolist() == own, "the forward's own rows are back"
    assert rows[:6] == own and len(set(rows)) == 12
    assert all(14 <= row < 28 for row in rows[6:]), "the rest are rows of the third and fourth request, which are padding"
    assert gate.rows is None
    with Gate().on_reserved(12):
        Gate().put(Gate().padding(4, k, "cpu"), 0)  # without an adapter nothing of it exists


def server_args(decode="full", **fields):
    fields = {"attention_backend": "triton", "prefill_attention_backend": None, "decode_attention_backend": None, "device": "cuda"} | fields
    fields = {"speculative_attention_mode": "prefill"} | fields
    return SimpleNamespace(**fields, cuda_graph_config=SimpleNamespace(decode=SimpleNamespace(backend=decode)))


def test_off_until_asked_for(monkeypatch):
    monkeypatch.setattr(algorithm, "accelerator_available", lambda: True)
    assert [algorithm.resolve_graphs(asked, server_args()) for asked in (AUTO, OFF, ON)] == [OFF, OFF, ON]
    args = server_args()
    algorithm.disable_decode_graphs(args)
    assert args.cuda_graph_config.decode.backend == "disabled"
    # Nor are branch rounds.
    assert [algorithm.resolve_salvage(salvage, server_args(), ON) for salvage in (AUTO, CHAIN, OFF)] == [OFF, CHAIN, OFF]
    assert algorithm.resolve_salvage(AUTO, server_args(attention_backend="torch_native"), ON) == OFF


@pytest.mark.parametrize(
    "args, words",
    [
        (server_args(attention_backend="flashinfer"), ["--attention-backend flashinfer", "allowed: triton"]),
        (server_args(decode_attention_backend="flashinfer"), ["--decode-attention-backend flashinfer", "allowed: triton"]),
        (server_args("breakable"), ["--cuda-graph-backend-decode breakable", "allowed: full"]),
        (server_args("disabled"), ["--cuda-graph-backend-decode disabled", "allowed: full"]),
    ],
)
def test_what_cannot_be_captured_is_refused_in_one_line(args, words, monkeypatch):
    monkeypatch.setattr(algorithm, "accelerator_available", lambda: True)
    with pytest.raises(SettingError) as error:
        algorithm.resolve_graphs(ON, args)
    assert all(word in str(error.value) for word in ["IDLM_DECODE_GRAPHS=on", *words]) and "\n" not in str(error.value)


def test_a_branch_is_captured_with_triton_attention_alone():
    assert algorithm.resolve_salvage(BRANCH, server_args(), ON) == BRANCH
    with pytest.raises(SettingError, match="IDLM_SALVAGE=branch .* IDLM_DECODE_GRAPHS=on and --attention-backend torch_native"):
        algorithm.resolve_salvage(BRANCH, server_args(attention_backend="torch_native"), ON)


def test_the_masks_of_graphs_have_room_for_the_kv_pool_and_for_padding(monkeypatch):
    sizes = {1: [1, 64], 4: [1, 64], 8: [1, 32]}
    monkeypatch.setattr(graph_sizes, "sizes_of", lambda _, stride: sizes[stride])
    monkeypatch.setattr(graph_sizes, "handed_down", lambda: None)
    monkeypatch.setattr(graph_sizes, "captured_strides", lambda _: tuple(sizes))
    runner = SimpleNamespace(max_total_num_tokens=100_000, req_to_token_pool=SimpleNamespace(req_to_token=torch.empty(65, 4096, device="meta")))
    assert graph_sizes.mask_bytes(runner) == (15 * 100_000, 32 * 15 * 16)
    runner.max_total_num_tokens = 10_000_000
    assert graph_sizes.mask_bytes(runner)[0] == 15 * 32 * 4096, "no more than the requests' tables"


def test_a_runner_that_is_not_ours_is_refused():
    with pytest.raises(SettingError, match="Runner cannot replay"):
        ready(SimpleNamespace(device="cuda", decode_cuda_graph_runner=Runner(7)), Settings())
    ready(SimpleNamespace(device="cuda", decode_cuda_graph_runner=None), Settings(decode_graphs=OFF))


def test_dummy_forwards_have_a_verify_input(monkeypatch):
    monkeypatch.setattr("idlm_sglang.compat.graphs.is_isd", lambda: True)
    made = compat.verify_input_of_dummies(None, None, None, 7, False)
    assert made.num_tokens_per_req == 7 and made.custom_mask is None
    assert compat.verify_input_of_dummies("theirs", None, None, 7, False) == "theirs"


# Interpreted Triton takes its time: without a GPU the adapter's run, in which everything of the other is, has to do.
RUNS = ("triton", "triton risd") if algorithm.accelerator_available() else ("triton risd",)


def captured(run: str) -> tuple[str, ...]:
    return ("-m", "tests.engine.captured", *run.split())


@pytest.fixture(scope="module", params=[pytest.param(run, marks=pytest.mark.beside(*captured(run))) for run in RUNS])
def steps(request):
    """The same steps eager and through captured forwards, in a process of their own (`captured.py`): on a GPU by real graphs, elsewhere with Triton
    interpreted, and calls in place of graphs."""
    done = beside.finished(request.config, *captured(request.param))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_replays_give_the_tokens_of_eager_steps(steps):
    from tests.engine.captured import SIZES, STEPS, STRIDES

    assert steps["sizes"] == {str(2 * stride - 1): list(SIZES) for stride in STRIDES}
    assert steps["captured"] == steps["eager"]
    assert steps["replayed"] == [stride in STRIDES and size <= max(SIZES) for size, stride in STEPS], "what no runner takes runs eagerly"
    assert not any(steps["eager_replayed"])
    accepted = sum(len(row) for answers in steps["captured"] for row in answers)
    assert steps["drafts_tried"] > 0 and accepted > sum(size for size, _ in STEPS), "some draft was accepted"
    # The eager steps saw what their rounds let them see, so the captured ones did: a MASK row that sees too much draws another draft.
    assert steps["hidden"] > 50 and steps["attention_apart"] < 1e-4
    # KV, drafts and their stamps as after eager steps; padding wrote nothing but the padding slot.
    assert steps["kv_apart"] < 1e-3 and steps["state_apart"] == 0
    assert steps["touched"] == steps["eager_touched"] == 0 and steps["padding_state"] == 0
    # A step may begin behind the context, where the one before it is not known to have ended its request.
    room = {one for one in steps["room"] if one is not None}
    assert room <= {steps["context"] + 2 * max(STRIDES) - 1} and bool(room) == ("triton" in steps["backend"])
    print(f"{sum(steps['replayed'])} of {len(STEPS)} steps replayed, {accepted} tokens, KV apart by {steps['kv_apart']:.1e}")
