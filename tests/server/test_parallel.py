"""Two tensor-parallel ranks agree on every token and count once; data-parallel ranks are told apart by a label.

Each serves with another grammar backend. They agree on what a class of letters allows (llguidance forbids some spellings of fixed
words, token by token), but not on how to end: xgrammar and llguidance allow each of the checkpoint's end tokens, outlines the
tokenizer's alone. The other one is biased away.
"""

import re

import pytest
import requests

from tests.server.fleet import server_fixture
from tests.server.harness import CHECKPOINT, Server, differing, ids, prompts

ISD = ("--speculative-algorithm", "ISD", "--enable-metrics")
# One core per rank: SGLang wants to be told on a machine with a single NUMA node.
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "IDLM_STRIDE": "auto"}

ONE_END = {"logit_bias": {"0": -100.0}}


def mixed_calls():
    calls = [{"prompt": p, "temperature": 0, "max_new_tokens": 40} for p in prompts(30, seed=121)]
    calls += [{"prompt": p, "temperature": 1.0, "top_p": 0.9, "sampling_seed": i, "max_new_tokens": 24} for i, p in enumerate(prompts(20, seed=122))]
    terms = [{"presence_penalty": 0.8}, {"regex": "[a-z ]{10,30}", **ONE_END}]
    terms += [{"regex": "[a-z ]{12,40}", "repetition_penalty": 1.3, "min_new_tokens": 8, **ONE_END}]
    calls += [{"prompt": p, "temperature": i % 2, "sampling_seed": i, "max_new_tokens": 32, **terms[i % 3]} for i, p in enumerate(prompts(30, seed=124))]
    return calls


@server_fixture
def tp2(logs):
    return Server("tp2", CHECKPOINT, logs, *ISD, "--tp-size", "2", "--grammar-backend", "llguidance", env=TWO_RANKS)


@server_fixture
def dp2(logs):
    return Server("dp2", CHECKPOINT, logs, *ISD, "--dp-size", "2", "--grammar-backend", "outlines", env=TWO_RANKS)


def test_tensor_parallel_ranks_agree_and_count_once(ar, tp2):
    calls = mixed_calls()
    unseeded = [{"prompt": p, "temperature": 1.0, "max_new_tokens": 24, "stride": 2 + i % 7} for i, p in enumerate(prompts(20, seed=123))]
    want = ar.many(calls, 16)
    before = tp2.metrics()
    got = tp2.many(calls + unseeded, 16)
    after = tp2.metrics()
    # Ranks that drew different tokens would differ in length, and the collective would hang or fail.
    assert tp2.alive()
    assert not differing(want, got[: len(calls)])
    counted = after["idlm:tokens_committed_total"] - before["idlm:tokens_committed_total"]
    assert counted == sum(len(ids(a)) - 1 for a in got)
    # Ranks that chose their strides for themselves would have hung.
    used = [sample for sample in after if sample.startswith("idlm:steps_total")]
    assert len(used) >= 2, used


def test_data_parallel_ranks_have_their_own_series(ar, dp2):
    calls = mixed_calls()
    want = ar.many(calls, 16)
    got = dp2.many(calls, 16)
    unseeded = dp2.many([{"prompt": "<|im_start|>user\nMy name is", "temperature": 1.0, "max_new_tokens": 24, "ignore_eos": True}] * 40, 16)
    text = requests.get(dp2.url + "/metrics", timeout=30).text
    live = dp2.live()
    assert not differing(want, got)
    assert [state["effective_max_running_requests_per_dp"] for state in dp2.info()["internal_states"]][0] == 64, "as many on each replica as on one server"
    # Replicas with one seed would give every answer twice.
    assert len({tuple(ids(a)) for a in unseeded}) > 34, "ranks must not draw the same numbers"
    found = re.findall(r'^idlm:tokens_committed_total\{dp_rank="(\d)",[^}]*\} (\S+)', text, re.M)
    assert (live["replicas"], live["tokens_committed"]) == (2, sum(float(value) for _, value in found))
    assert sorted(rank for rank, _ in found) == ["0", "1"] and all(float(value) > 0 for _, value in found), found
