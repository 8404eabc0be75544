"""The worker's own steps by both kinds of step ops: the same logits, the same tokens, drafts and figures.

Everything is the worker's as it is (state, penalties, grammars, rows) but the model's forward, whose logits are made up.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from idlm_sglang.config import BRANCH, CHAIN, OFF, TORCH, TRITON, Settings
from idlm_sglang.demo import CHECKPOINT_DIR
from idlm_sglang.engine.lora import Gate
from idlm_sglang.engine.masks import BranchMask
from idlm_sglang.engine.penalties import TokenCounts
from idlm_sglang.engine.phases import StepPhases
from idlm_sglang.engine.ranks import Ranks
from idlm_sglang.engine.requests import STRIDED, BatchRows, RequestPlan
from idlm_sglang.engine.sampler import TokenKeyedSampler
from idlm_sglang.engine.spec_io import IsdVerifyInput
from idlm_sglang.engine.state import SlotState
from idlm_sglang.engine.step_inputs import Layout, Requests
from idlm_sglang.engine.step_ops import TritonOps, step_ops
from idlm_sglang.engine.strided import StridedStep
from idlm_sglang.engine.warm import first_drafts
from idlm_sglang.engine.worker import IsdWorker
from idlm_sglang.isd import SamplingRows
from idlm_sglang.isd.target import TOP_K_OFF, host_flags
from tests.engine.test_grammar import xgrammar_object
from tests.kernels.common import MIXED, parameters, random_logits
from tests.kernels.conftest import INTERPRETED
from tests.kernels.test_step import RULES

VOCAB, MASK, K, SLOTS, COLUMNS = 1024, 3, 2, 12, 96
PROMPT = 10
FORCED = 97  # "~", which no other token begins with
SAMPLED = dict(temperature=1.0, top_k=TOP_K_OFF, top_p=1.0, min_p=0.0)
PENALTIES = dict(frequency_penalty=0.6, presence_penalty=0.8, repetition_penalty=1.3, min_new_tokens=5)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT_DIR)


def request(number: int, coupled: bool = True, grammar=None, limit: int | None = None, **params):
    plan = RequestPlan(number, STRIDED, "default", limit, 1_000_003 * number, coupled)
    neutral = dict(frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0, min_new_tokens=0, stop_token_ids=[7, 9])
    params = SimpleNamespace(**{**SAMPLED, **neutral, **params})
    req = SimpleNamespace(idlm_plan=plan, sampling_params=params, grammar=grammar, tokenizer=None, eos_token_ids=[2], origin_input_ids=[0] * PROMPT)
    req.finished = lambda: False
    return req


def mixture(tokenizer) -> list:
    """Every rule, truncation and addition to the logits."""
    return [
        request(1, top_k=1),
        request(2, temperature=0.8),
        request(3, coupled=False),
        request(4, coupled=False, temperature=0.7, top_k=20, top_p=0.9, **PENALTIES),
        request(5, temperature=1.2, min_p=0.05, limit=2, **PENALTIES),
        request(6, grammar=xgrammar_object(tokenizer, "[a-f]{2,30}")),
        request(7, top_k=1, **PENALTIES),
        # Its first drafts are forced, in place of those that the MASK rows drew.
        request(8, grammar=xgrammar_object(tokenizer, "~{3}[a-f]{2,30}")),
    ]


class Arm:
    """A worker with its own requests, fed logits from outside."""

    def __init__(self, kind: str, reqs: list, salvage: str, device: str):
        worker = IsdWorker.__new__(IsdWorker)
        worker.device, worker.mask_id, worker.vocab, worker.last_position = device, MASK, VOCAB, COLUMNS - 1
        worker.phases, worker.ops = StepPhases(), step_ops(kind)
        worker.settings = Settings(stride=K + 1, max_stride=K + 2, auto=False, salvage=salvage)
        worker.state = SlotState(SLOTS, K + 1, VOCAB, True, device)
        worker.counts = TokenCounts(SLOTS, VOCAB, device)
        worker.req_to_token = torch.randint(1, 9999, (SLOTS, COLUMNS), generator=torch.Generator().manual_seed(3)).int().to(device)
        worker.gate, worker.masks = Gate(adapted=False), BranchMask(device, worker.ops.hide) if salvage == BRANCH else None
        worker.trims, worker.ranks = False, Ranks()
        worker._target_worker = SimpleNamespace(forward_batch_generation=lambda **_: self.out)
        self.worker, self.reqs, self.salvage, self.device, self.out = worker, reqs, salvage, device, None
        self.at_stride(K + 1)
        params = [req.sampling_params for req in reqs]
        column = lambda name, dtype: torch.tensor([getattr(p, name) for p in params], dtype=dtype, device=device)
        info = SimpleNamespace(
            temperatures=column("temperature", torch.float32)[:, None], top_ks=column("top_k", torch.int32),
            top_ps=column("top_p", torch.float32), min_ps=column("min_p", torch.float32), has_custom_logit_processor=False,
            logit_bias=torch.randn(len(reqs), VOCAB, generator=torch.Generator().manual_seed(1)).to(device),
        )  # fmt: skip
        slots = torch.randperm(SLOTS - 1, generator=torch.Generator().manual_seed(2))[: len(reqs)] + 1
        lengths = torch.arange(PROMPT, PROMPT + len(reqs))
        self.batch = SimpleNamespace(
            reqs=reqs, idlm_columns=len(reqs) * COLUMNS, req_pool_indices=slots.to(device), seq_lens=lengths.to(device), sampling_info=info, return_logprob=False,
            spec_info=SimpleNamespace(bonus_tokens=torch.full((len(reqs),), 40, device=device)),
        )  # fmt: skip
        worker.counts.restart(self.batch.req_pool_indices, [[40, 50, 50] for _ in reqs])

    def at_stride(self, stride: int) -> None:
        self.rows = BatchRows(self.reqs, [req.idlm_plan for req in self.reqs], self.worker.settings, stride, VOCAB, self.device)

    def first(self, logits: torch.Tensor, fewer: int = 0) -> None:
        """``fewer``: than the stride has drafts."""
        rows, k = list(range(0, len(self.reqs), 2)), self.rows.drafts - fewer
        first_drafts(self.worker, self.batch, rows, self.rows, logits[: len(rows), :k].reshape(len(rows) * k, VOCAB).to(self.device))

    def prepare(self, logits: torch.Tensor) -> None:
        """The next forward gives these logits ``(B, 2K + 1, V)``."""
        logits_output = SimpleNamespace(next_token_logits=logits.to(self.device).view(-1, VOCAB).clone())
        self.out = SimpleNamespace(logits_output=logits_output, can_run_cuda_graph=False, expert_distribution_metrics=None)

    def run(self):
        step = StridedStep(self.worker, self.batch, self.rows, self.salvage)
        # Of counts and forks a branch round's mask is made.
        self.inputs = [step.tokens, step.positions, step.places, step._carried.counts, step._inputs.forks]
        return step.finish(*step.verify())

    def step(self, logits: torch.Tensor) -> tuple[list[list[int]], torch.Tensor]:
        """Committed tokens by request, and the step's figures."""
        count, k = len(self.reqs), self.rows.drafts
        self.prepare(logits)
        result = self.run()
        lens = result.accept_lens.tolist()
        tokens = [row[:n] for row, n in zip(result.next_token_ids.view(count, k + 1).tolist(), lens)]
        for req, committed in zip(self.reqs, tokens):
            if req.grammar is not None:
                for token in committed:
                    req.grammar.accept_token(token)
        self.batch.seq_lens, self.batch.spec_info = result.new_seq_lens, result.next_draft_input
        return tokens, result.round_stats

    def carried(self) -> tuple:
        """Per request: clean count, valid drafts with their log q, and q of those that are drawn by it."""
        state, slots = self.worker.state, self.batch.req_pool_indices.tolist()
        found, real = [], []
        for slot, req in zip(slots, self.reqs):
            n = int(state.counts[slot])
            found.append((int(state.clean_counts[slot]), int(state.lengths[slot]), state.drafts[slot, :n].tolist()))
            by_q = req.sampling_params.top_k > 1 and not req.idlm_plan.coupled
            real += [state.log_q[slot, :n], *([state.q[slot, :n].flatten()] if by_q else [])]
        return found, torch.cat(real)


CLOSE = dict(rtol=1e-5, atol=2e-6)


def assert_equal_arms(plain: Arm, kernels: Arm) -> None:
    """What the last step put into the forward, and what is kept for the next one."""
    for want, got in zip(plain.inputs, kernels.inputs, strict=True):
        assert torch.equal(want, got) and want.dtype == got.dtype and got.is_contiguous()
    (want, want_real), (got, got_real) = plain.carried(), kernels.carried()
    assert got == want
    torch.testing.assert_close(got_real, want_real, **CLOSE)
    assert torch.equal(plain.batch.seq_lens, kernels.batch.seq_lens) and kernels.batch.seq_lens.dtype == torch.int64
    assert torch.equal(plain.worker.counts.counts, kernels.worker.counts.counts)


@pytest.mark.parametrize("salvage", [OFF, BRANCH, CHAIN])
def test_both_kinds_of_ops_take_the_worker_through_the_same_steps(salvage, tokenizer, device, monkeypatch):
    """Warm first drafts for every other request, then steps that accept some drafts and reject some, by every rule side by side."""
    monkeypatch.setattr(IsdVerifyInput, "prepare_for_verify", lambda self, batch, worker, **_: (None, False))
    arms = [Arm(kind, mixture(tokenizer), salvage, device) for kind in (TORCH, TRITON)]
    random = torch.Generator().manual_seed(9)
    count, accepted, rejected = len(arms[0].reqs), 0, 0
    # What all rows have in common makes drafts good; the rest makes some fall.
    common = torch.randn(VOCAB, generator=random) * 3
    for number in range(2):
        logits = common + torch.randn(count, 2 * K + 1, VOCAB, generator=random) * 0.6
        logits[..., MASK] = float("-inf")
        if number == 0:
            for arm in arms:
                arm.first(logits)
            (plain, plain_real), (kernels, kernels_real) = (arm.carried() for arm in arms)
            assert plain == kernels and any(drafts for *_, drafts in plain)
            torch.testing.assert_close(kernels_real, plain_real, **CLOSE)
        (want, stats), (got, kernel_stats) = (arm.step(logits) for arm in arms)
        assert got == want
        torch.testing.assert_close(kernel_stats, stats, rtol=1e-5, atol=1e-5)
        assert_equal_arms(*arms)
        assert number or want[-1] == [FORCED] * (K + 1), "forced drafts stand"
        accepted += sum(len(tokens) - 1 for tokens in want)
        rejected += int((stats[:, 1] < stats[:, 0]).sum())
    print(f"salvage {salvage}: {accepted} drafts accepted, {rejected} rounds ended by a rejection")
    assert accepted >= 5 and rejected >= 3


@pytest.mark.parametrize("kind", [TORCH, TRITON])
@pytest.mark.parametrize("salvage", [OFF, BRANCH])
def test_behind_few_first_drafts_nothing_is_left_of_what_the_slots_held(kind, salvage, tokenizer, device, monkeypatch):
    """Short answers have fewer MASK rows behind their prompts than the stride has drafts."""
    monkeypatch.setattr(IsdVerifyInput, "prepare_for_verify", lambda self, batch, worker, **_: (None, False))
    clean, full = (Arm(kind, mixture(tokenizer), salvage, device) for _ in range(2))
    state = full.worker.state
    state.drafts.fill_(7)
    state.log_q.fill_(-0.25), state.sure.fill_(-0.5), state.q.fill_(1 / VOCAB)
    random = torch.Generator().manual_seed(11)
    common = torch.randn(VOCAB, generator=random) * 3
    tried = 0
    for number in range(3):
        logits = common + torch.randn(len(clean.reqs), 2 * K + 1, VOCAB, generator=random) * 0.5
        logits[..., MASK] = float("-inf")
        for arm in (clean, full):
            if number == 0:
                arm.first(logits, fewer=K - 1)
        (want, stats), (got, full_stats) = (arm.step(logits) for arm in (clean, full))
        assert got == want
        torch.testing.assert_close(full_stats, stats, rtol=1e-5, atol=1e-5)
        assert_equal_arms(clean, full)
        tried += 0 if number else int(stats[:, 0].sum())
    assert 0 < tried <= len(clean.reqs), "one draft of every other request"



@pytest.mark.parametrize("salvage", [CHAIN, BRANCH])
def test_drafts_follow_their_request_through_strides_and_leave_it_with_its_length(salvage, tokenizer, device, monkeypatch):
    """A wider, a narrower, and again a wider stride; then a slot with another request, and a request that was retracted and came back longer."""
    monkeypatch.setattr(IsdVerifyInput, "prepare_for_verify", lambda self, batch, worker, **_: (None, False))
    random, widest = torch.Generator().manual_seed(4), K + 2
    common = torch.randn(VOCAB, generator=random) * 4

    def requests():
        return [
            request(1, top_k=1), request(2, temperature=0.8), request(3, coupled=False), request(4, top_k=1),
            request(5, grammar=xgrammar_object(tokenizer, "[a-f]{1}~{4}[a-f]{2,30}")),
        ]  # fmt: skip

    arms = [Arm(kind, requests(), salvage, device) for kind in (TORCH, TRITON)]
    for arm in arms:
        # Some rows stand behind the end of the context.
        arm.worker.last_position = PROMPT + 9
    tried = []
    for number, stride in enumerate((widest, 2, widest, widest)):
        logits = common + torch.randn(len(arms[0].reqs), 2 * stride - 1, VOCAB, generator=random) * 0.4
        logits[..., MASK] = float("-inf")
        kept = [len(drafts) for _, _, drafts in arms[0].carried()[0]]
        if number == 3:
            kept[:2] = 0, 0
        for arm in arms:
            arm.at_stride(stride)
            if number == 0:
                arm.first(logits)
            if number == 3:
                arm.reqs[0] = request(9, top_k=1)
                arm.batch.seq_lens = arm.batch.seq_lens + torch.tensor([0, 1, 0, 0, 0], device=device)
                arm.at_stride(stride)
        (want, stats), (got, kernel_stats) = (arm.step(logits) for arm in arms)
        assert got == want
        torch.testing.assert_close(kernel_stats, stats, rtol=1e-5, atol=1e-5)
        assert_equal_arms(*arms)
        if number:
            # What the grammar makes of the last request's drafts is not what was kept.
            assert kernel_stats[:4, 0].tolist() == [min(count, stride - 1) for count in kept[:4]]
            tried.append(kernel_stats[:4, 0].tolist())
    print(f"salvage {salvage}: drafts tried by request at strides 2, {widest}, {widest}: {tried}")
    assert max(tried[0]) == 1 and tried[2][:2] == [0, 0] and max(tried[2]) == widest - 1


def rows_with(params: list, device: str) -> SamplingRows:
    return parameters(params, device, seed=3)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("kind", [TORCH, TRITON])
def test_a_decode_step_of_the_worker_does_not_wait_for_the_device(kind, tokenizer, device, monkeypatch):
    monkeypatch.setattr(IsdVerifyInput, "prepare_for_verify", lambda self, batch, worker, **_: (None, False))
    arm = Arm(kind, [req for req in mixture(tokenizer) if req.grammar is None], BRANCH, device)
    arm.prepare(torch.randn(len(arm.reqs), 2 * K + 1, VOCAB))
    arm.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        arm.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", [TORCH, TRITON])
def test_the_sampler_draws_what_a_cold_step_commits(kind, device):
    """Our part of SGLang's sampler, for prefill and stride 1: the logits are overwritten between its two calls."""
    params = [p for p in MIXED if p.coupled or p.top_k == 1] + [RULES["coupled"]]
    ops, rows = step_ops(kind), rows_with(params, device)
    count, seq_lens = len(params), torch.arange(5, 5 + len(params), device=device)
    logits = random_logits(count, 2 * K + 1, 300, 8, device)
    none = torch.zeros(count, dtype=torch.int64, device=device)
    requests = Requests(SlotState(count + 1, K, 300, False, device), none + torch.arange(1, count + 1, device=device), none, seq_lens, none + K)
    table = torch.zeros(count + 1, COLUMNS, dtype=torch.int32, device=device)
    inputs = ops.load(requests, Layout(K, CHAIN, none, table, MASK, COLUMNS - 1), False)
    step = ops.step(logits.clone(), requests, inputs, rows, True)
    sampler, single = TokenKeyedSampler.__new__(TokenKeyedSampler), logits[:, 0].clone()
    torch.nn.Module.__init__(sampler)
    sampler._ops = ops
    info = SimpleNamespace(
        idlm_seeds=rows.seed, idlm_flags=host_flags((p.top_k, p.top_p, p.min_p) for p in params), temperatures=rows.temperature[:, None],
        top_ks=rows.top_k, top_ps=rows.top_p, min_ps=rows.min_p, is_all_greedy=False, has_custom_logit_processor=False,
        need_top_k_sampling=True, need_top_p_sampling=True, need_min_p_sampling=True, sampling_mask_batch_indices=None,
    )  # fmt: skip
    sampler._preprocess_logits(single, info)
    single.fill_(float("nan"))
    tokens, _ = sampler._sample_from_probs(single, info, seq_lens.to(torch.int32), False)
    assert torch.equal(tokens, step.last) and (step.accept_lens == 1).all()
    # The drafts of that step, drawn by the rows that `first` knows as those behind a prompt one token longer.
    first = ops.first(logits[:, 1 : K + 1].clone(), replace(requests, seq_lens=seq_lens + 1), rows)
    assert torch.equal(first.drafts, step.proposal.drafts) and torch.equal(first.counts, step.proposal.counts)
    assert torch.equal(first.log_q, step.proposal.log_q)


def test_both_kinds_know_the_same_probabilities(device):
    """What AR serving returns as a sampling mask."""
    rows = rows_with(MIXED, device)
    logits = random_logits(len(MIXED), 1, 300, 12, device)
    want, got = (ops.probabilities(ops.keep(logits.clone(), rows), rows) for ops in (step_ops(TORCH), step_ops(TRITON)))
    assert torch.equal(want > 0, got > 0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_a_wrong_kernel_step_is_noticed(tokenizer, device, monkeypatch):
    """The steps are compared in earnest: q of the wrong slots is enough."""
    step = TritonOps.step

    def elsewhere(self, logits, requests, *rest):
        return step(self, logits, replace(requests, slots=requests.slots.flip(0)), *rest)

    monkeypatch.setattr(TritonOps, "step", elsewhere)
    with pytest.raises(AssertionError):
        test_both_kinds_of_ops_take_the_worker_through_the_same_steps(OFF, tokenizer, device, monkeypatch)
