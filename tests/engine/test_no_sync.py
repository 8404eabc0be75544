"""A strided step of the worker reads nothing back from the device.

Fake tensors have no values: `.item()`, `.cpu()` on a fake cuda tensor, or a branch on a tensor fails under FakeTensorMode.
The model's forward is replaced by fake logits and one gated layer; everything the worker itself does around it runs as it is. Of the kernels
only what surrounds their launches: a launch is handed its arguments, and reads nothing on the host.
"""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from idlm_sglang.config import BRANCH, CHAIN, OFF, TORCH, TRITON, Settings
from idlm_sglang.engine import beside
from idlm_sglang.engine.lora import Gate, LoraLinear
from idlm_sglang.engine.masks import BranchMask
from idlm_sglang.engine.spec_io import IsdVerifyInput
from idlm_sglang.engine.penalties import TokenCounts
from idlm_sglang.engine.phases import StepPhases
from idlm_sglang.engine.ranks import Ranks
from idlm_sglang.engine.state import SlotState
from idlm_sglang.engine.step_ops import step_ops
from idlm_sglang.engine.strided import StridedStep
from idlm_sglang.engine.worker import IsdWorker
from idlm_sglang.isd import SamplingRows, parts
from idlm_sglang.isd.penalties import PenaltyRows

SLOTS, COLUMNS, VOCAB, K, BATCH = 9, 64, 50, 3, 4


def fake_worker(device, logits, salvage, kind):
    worker = IsdWorker.__new__(IsdWorker)
    worker.device, worker.mask_id, worker.vocab, worker.last_position = device, 3, VOCAB, COLUMNS - 1
    worker.phases, worker.ops = StepPhases(), step_ops(kind)
    worker.settings = Settings(stride=K + 1, max_stride=K + 1, auto=False, salvage=salvage)
    worker.state = SlotState(SLOTS, K, VOCAB, True, device)
    worker.counts = TokenCounts(SLOTS, VOCAB, device)
    worker.req_to_token = torch.zeros(SLOTS, COLUMNS, dtype=torch.int32, device=device)
    out = SimpleNamespace(logits_output=SimpleNamespace(next_token_logits=logits), can_run_cuda_graph=False, expert_distribution_metrics=None)
    worker.gate = Gate(adapted=True)
    worker.masks = BranchMask(device, worker.ops.hide) if salvage == BRANCH else None
    worker.gate.reserve(SLOTS * K, device)
    adapter = LoraLinear(torch.zeros(2, 8, device=device), [torch.zeros(VOCAB, 2, device=device)])

    def forward(**_):
        assert worker.gate.rows.shape == (BATCH * K,), "as many gated rows as batch size and stride say, whatever the drafts"
        adapter.add_(logits, torch.zeros(len(logits), 8, device=device), worker.gate.rows)
        return out

    worker._target_worker = SimpleNamespace(forward_batch_generation=forward)
    worker.ranks = Ranks()
    worker.trims = False  # that looks at the drafts, on a CPU, where they are at hand
    return worker


def fake_penalised(device):
    ints, reals = torch.zeros(2, dtype=torch.int64, device=device), torch.ones(2, device=device)
    return SimpleNamespace(
        index=ints,
        prompt_lens=ints,
        penalties=PenaltyRows(reals, reals, reals, ints, ints[:, None].expand(2, 3), any_repetition=True, any_min_new=True),
    )


def fake_rows(device, rejection):
    def column(value, dtype):
        return torch.full((BATCH,), value, dtype=dtype, device=device)

    sampling = SamplingRows(
        temperature=column(1.0, torch.float32),
        top_k=column(20, torch.int32),
        top_p=column(0.9, torch.float32),
        min_p=column(0.05, torch.float32),
        seed=column(1, torch.int64),
        coupled=column(not rejection, torch.bool),
        any_sampled=True,
        any_truncated=True,
        largest_top_k=20,
        min_p_only=False,
        any_greedy=True,
        any_rejection=rejection,
    )
    return SimpleNamespace(
        numbers=column(1, torch.int64),
        limits=column(K, torch.int64),
        limits_host=[K] * BATCH,
        drafts=K,
        any_rejection=rejection,
        grammars=[],
        single_grammar=False,
        penalised=fake_penalised(device),
        sampling=lambda info: sampling,
    )


def fake_batch(device):
    return SimpleNamespace(
        reqs=[SimpleNamespace()] * BATCH,
        idlm_columns=BATCH * COLUMNS,
        req_pool_indices=torch.arange(1, BATCH + 1, device=device),
        seq_lens=torch.full((BATCH,), 10, dtype=torch.int64, device=device),
        spec_info=SimpleNamespace(bonus_tokens=torch.zeros(BATCH, dtype=torch.int64, device=device)),
        sampling_info=SimpleNamespace(logit_bias=torch.zeros(BATCH, VOCAB, device=device), has_custom_logit_processor=False),
        return_logprob=False,
    )


class Launches(TorchDispatchMode):
    """Notes the names of torch's operations that run on the device: no views, no memory that stays unwritten, no constants of the host."""

    NONE = ("device", "detach", "view", "empty", "empty_like", "scalar_tensor")

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in self.NONE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def step(device, rejection, monkeypatch, salvage=OFF, kind=TORCH, launched=None):
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **_: launched.append(kernel.__name__))

    def prepared(self, *_, **__):
        assert (self.custom_mask is not None) == (salvage == BRANCH), "a branch round has its mask, whatever the drafts"
        return None, False

    monkeypatch.setattr(IsdVerifyInput, "prepare_for_verify", prepared)
    with FakeTensorMode(allow_non_fake_inputs=False):
        worker = fake_worker(device, torch.zeros(BATCH * (2 * K + 1), VOCAB, device=device), salvage, kind)
        published = []
        step = StridedStep(worker, fake_batch(device), fake_rows(device, rejection), salvage)
        result = step.finish(*step.verify(), published.append)
    return result, published


@pytest.mark.parametrize("rejection", [True, False])
@pytest.mark.parametrize("salvage, at_once", [(OFF, BATCH), (BRANCH, BATCH), (CHAIN, BATCH), (CHAIN, 1)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_strided_step_reads_nothing_back(device, salvage, at_once, rejection, monkeypatch):
    monkeypatch.setattr(parts, "CELLS", at_once * (2 * K + 1) * VOCAB)
    result, published = step(device, rejection, monkeypatch, salvage)
    assert result.next_token_ids.shape == (BATCH * (K + 1),) and result.round_stats.shape == (BATCH, 4)
    assert len(published) == 1, "the new lengths are published once per forward"
    assert result.next_token_ids.device.type == device


def test_survivors_are_a_chain_in_a_prompts_forward_that_takes_no_mask():
    """SGLang's Triton attention has masks in verify forwards only; the CPU's own hides columns in both."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        worker = fake_worker("cpu", torch.zeros(BATCH * (2 * K + 1), VOCAB), BRANCH, TORCH)
        worker.rows_of = lambda batch: fake_rows("cpu", False)
        assert beside._step(worker, fake_batch("cpu"))._salvage == CHAIN
        worker.masks = None
        assert beside._step(worker, fake_batch("cpu")).visible.shape == (BATCH, 2 * K + 1, 2 * K + 1)


@pytest.mark.parametrize("rejection", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_by_kernels_reads_nothing_back(device, rejection, monkeypatch):
    launched = []
    result, _ = step(device, rejection, monkeypatch, BRANCH, TRITON, launched)
    drawn = ["_scan", "_join", "_cut", "_collect", "_select", *["_residual"] * rejection, "_commit", *["_write"] * rejection]
    assert launched == ["_load", "_hide", *drawn, "_store"]
    assert result.next_token_ids.shape == (BATCH * (K + 1),) and result.next_token_ids.device.type == device


@pytest.mark.parametrize("salvage, adapted, more", [(OFF, False, 0), (CHAIN, False, 0), (BRANCH, False, 0), (OFF, True, 2)])
def test_around_the_forward_a_step_by_kernels_launches_nothing_else(salvage, adapted, more, monkeypatch):
    """Requests without penalties, bias and logprobs. An adapter's choice of rows is torch's."""
    counts = {}
    for kind in (TORCH, TRITON):
        launched = []
        monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **_: launched.append(kernel))
        monkeypatch.setattr(IsdVerifyInput, "prepare_for_verify", lambda self, batch, worker, **_: (None, False))
        with FakeTensorMode(allow_non_fake_inputs=False):
            logits = torch.zeros(BATCH * (2 * K + 1), VOCAB, device="cuda")
            worker, batch, rows = fake_worker("cuda", logits, salvage, kind), fake_batch("cuda"), fake_rows("cuda", True)
            worker.gate, rows.penalised, batch.sampling_info.logit_bias = Gate(adapted), None, None
            worker.gate.reserve(SLOTS * K, "cuda")
            out = SimpleNamespace(logits_output=SimpleNamespace(next_token_logits=logits), can_run_cuda_graph=False, expert_distribution_metrics=None)
            worker._target_worker = SimpleNamespace(forward_batch_generation=lambda **_: out)
            for _ in range(2):
                launched.clear()
                with Launches(launched):
                    made = StridedStep(worker, batch, rows, salvage)
                    made.finish(*made.verify())
        counts[kind] = [name for name in launched if isinstance(name, str)]
        print(f"salvage {salvage}{', adapter' * adapted}, {kind}: {len(counts[kind])} torch operations, {len(launched) - len(counts[kind])} kernels")
    assert len(counts[TORCH]) > 100 and len(counts[TRITON]) == more, counts[TRITON]


def test_a_read_between_launches_is_noticed(monkeypatch):
    from idlm_kernels import step as kernels

    draw = kernels.draw
    monkeypatch.setattr(kernels, "draw", lambda rows, sampling: draw(rows, sampling) if int(rows.index.max()) else None)
    with pytest.raises(DataDependentOutputException):
        step("cpu", True, monkeypatch, kind=TRITON, launched=[])


def test_a_mask_sized_by_the_device_is_noticed(monkeypatch):
    write = BranchMask.write
    monkeypatch.setattr(BranchMask, "write", lambda self, *parts: write(self, *parts[:4], int((parts[2] + parts[3]).sum())))
    with pytest.raises(DataDependentOutputException):
        step("cpu", True, monkeypatch, BRANCH)


def test_a_planted_read_is_noticed(monkeypatch):
    load = SlotState.load

    def reading(self, *args):
        carried = load(self, *args)
        assert int(carried.counts.sum()) >= 0
        return carried

    monkeypatch.setattr(SlotState, "load", reading)
    with pytest.raises(DataDependentOutputException):
        step("cpu", True, monkeypatch)
