"""A server whose tokens come from the Triton kernels, interpreted where there is no GPU: the answers are those of plain torch.

Interpreted kernels are slow, so requests are few and short. Without the overlap schedule, so that decode steps ride in prompts' forwards, too.
"""

import pytest

from idlm_sglang.platform import accelerator_available
from tests.server.fleet import server_fixture
from tests.server.harness import CHECKPOINT, Server, differing, held_out_prompts, prompts
from tests.server.test_penalties_grammars import SCHEMA

SHORT = {"max_new_tokens": 16}
GREEDY = [
    {},
    {"presence_penalty": 1.5, "frequency_penalty": 0.4, "repetition_penalty": 1.2, "min_new_tokens": 12},
    {"json_schema": SCHEMA},
    {"logit_bias": {"9": 3.0}},
    {},
]
SEEDED = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 5, "min_p": 0.05},
    {"temperature": 0.9, "presence_penalty": 0.9},
    {"temperature": 1.0, "regex": "[a-z ]{10,30}"},
]
# Raw words, behind which the checkpoint is not sure of anything: another noise gives another answer.
UNSURE = ["river stone quiet lamp", "seven paper lanterns", "winter engine copper glass", "market blue window", "meadow"]


@server_fixture
def kernels(logs):
    env = {"IDLM_STEP_OPS": "triton", "IDLM_SAMPLING_RULE": "rejection", **({} if accelerator_available() else {"TRITON_INTERPRET": "1"})}
    flags = ["--disable-overlap-schedule", "--chunked-prefill-size", "32", "--enable-metrics"]
    return Server("kernels", CHECKPOINT, logs, "--speculative-algorithm", "ISD", *flags, env=env)


def test_greedy_answers_are_ars(ar, kernels):
    """Plain, penalised, by a grammar, biased: in one batch, at stride 4."""
    calls = [{"prompt": p, "temperature": 0, **SHORT, **GREEDY[i]} for i, p in enumerate(held_out_prompts(len(GREEDY)))]
    before = kernels.metrics()
    got, want = kernels.many(calls, len(calls)), ar.many(calls, len(calls))
    after = kernels.metrics()
    committed, accepted = (after[name] - before.get(name, 0.0) for name in ("idlm:tokens_committed_total", 'idlm:drafts_accepted_total{position="1"}'))
    print(f"{committed:.0f} tokens committed, {accepted:.0f} first drafts accepted, {after['idlm:mixed_steps_total']:.0f} steps in prompts' forwards")
    assert not differing(want, got) and accepted > 5


def test_seeded_answers_are_the_same_at_one_token_per_step_and_in_ar(ar, kernels):
    """The sampler of prefill and stride 1 draws by the kernels, too: their scores round differently from torch's."""
    calls = [{"prompt": p, "sampling_seed": 21 + i, **SHORT, **SEEDED[i]} for i, p in enumerate(UNSURE)]
    got = kernels.many([{**call, "stride": 4} for call in calls], len(calls))
    assert not differing(got, kernels.many([{**call, "stride": 1} for call in calls], len(calls)))
    # The AR server's ops are torch's: no two of these scores lie within a rounding of each other.
    assert not differing(got, ar.many(calls, len(calls)))


def test_logprobs_and_the_rejection_rule(ar, kernels):
    ask = {"prompt": held_out_prompts(2)[1], "temperature": 0, "max_new_tokens": 8, "return_logprob": True}
    (got, want) = (server.generate(**ask)["meta_info"]["output_token_logprobs"] for server in (kernels, ar))
    assert [token for _, token, *_ in got] == [token for _, token, *_ in want]
    assert [value for value, *_ in got] == pytest.approx([value for value, *_ in want], abs=1e-4)
    unseeded = [{"prompt": p, "temperature": 1.0, **SHORT, **cut} for p, cut in zip(prompts(2, seed=412), ({}, {"top_k": 20, "top_p": 0.9}))]
    answers = kernels.many(unseeded, 2)
    assert all("seed" not in answer["meta_info"] and answer["meta_info"]["completion_tokens"] for answer in answers)
    assert kernels.info()["internal_states"][0]["idlm"]["introspective_acceptance"] > 0.3


@pytest.mark.skipif(accelerator_available(), reason="kernels are compiled on a GPU")
def test_sglang_keeps_its_own_kernels_out_and_the_log_warns_once(kernels):
    assert kernels.info()["attention_backend"] == "torch_native"
    log = kernels.log.read_text(errors="replace")
    assert "step ops triton" in log and log.count("kernels are interpreted on the host") == 1
