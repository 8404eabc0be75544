"""The one-token sampler: which logits it draws from, and which of equal ones."""

from types import SimpleNamespace

import pytest
import sglang.srt.layers.sampler as theirs
import torch

from idlm_sglang.engine.sampler import TokenKeyedSampler
from idlm_sglang.engine.step_ops import step_ops
from idlm_sglang.isd.target import TOP_K_OFF, host_flags

VOCAB = 50
GREEDY, SAMPLED = (1, 1.0, 0.0), (TOP_K_OFF, 1.0, 0.0)


@pytest.fixture
def sampler(monkeypatch):
    """Without SGLang's constructor, which asks for a server's configuration."""
    monkeypatch.setattr(theirs, "get_exec", lambda: SimpleNamespace(kernel=SimpleNamespace(sampling_backend="pytorch")))
    made = TokenKeyedSampler.__new__(TokenKeyedSampler)
    torch.nn.Module.__init__(made)
    made._ops = step_ops("torch")
    made.rl_on_policy_target, made.enable_deterministic = None, False
    made.use_log_softmax_logprob = made.use_ascend_backend = False
    made.output_logprob_processor = SimpleNamespace(compute_logprobs=lambda *_: SimpleNamespace(write_output_to=lambda out: None))
    return made


def draw(sampler, logits, params, seeds=None, unmarked=None) -> list[int]:
    top_k, top_p, min_p = (torch.tensor(column) for column in zip(*params))
    info = SimpleNamespace(
        temperatures=torch.ones(len(params), 1),
        top_ks=top_k.to(torch.int32),
        top_ps=top_p,
        min_ps=min_p,
        is_all_greedy=False,
        has_custom_logit_processor=False,
        need_top_p_sampling=False,
        need_top_k_sampling=True,
        need_min_p_sampling=False,
        sampling_mask_batch_indices=None,
        sampling_support_logprobs_capture_indices=None,
        sampling_seed=None,
        max_top_k=None,
        grammars=None,
        idlm_seeds=seeds,
        idlm_flags=host_flags(params),
    )
    out = SimpleNamespace(next_token_logits=logits.clone())
    return sampler.forward(out, info, unmarked is not None, [], [], torch.arange(len(params)), logprob_logits=unmarked).tolist()


@pytest.mark.parametrize("seeds", [None, torch.tensor([4, 5])], ids=["unseeded", "seeded"])
@pytest.mark.parametrize("other", [GREEDY, SAMPLED], ids=["beside one that stays of a sampled batch", "beside a sampled one"])
def test_of_equal_logits_a_greedy_request_takes_the_first(sampler, other, seeds):
    torch.manual_seed(0)
    for _ in range(40):
        logits = torch.randn(2, VOCAB)
        first, second, third = sorted(torch.randperm(VOCAB)[:3].tolist())
        logits[0, [first, second, third]] = logits.max() + 1
        assert draw(sampler, logits, [GREEDY, other], seeds)[0] == first


def test_a_token_is_drawn_from_the_logits_with_the_watermark(sampler):
    torch.manual_seed(0)
    for forced in range(20):
        unmarked = torch.randn(2, VOCAB)
        marked = unmarked.clone()
        marked[1] = float("-inf")
        marked[1, forced] = 0.0
        seeds = torch.tensor([1, 2 + forced])
        assert draw(sampler, marked, [GREEDY, SAMPLED], seeds, unmarked) == [unmarked[0].argmax().item(), forced]
