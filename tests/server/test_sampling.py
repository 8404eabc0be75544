"""Sampled answers: the distribution is AR's, and a seed fixes the tokens whatever the stride and the batch."""

import random
from collections import Counter

import pytest
from scipy.stats import chi2_contingency

from tests.server.fleet import server_fixture
from tests.server.harness import CHECKPOINT, Server, chat, ids, prompts, with_pythonpath

# A question in the making has many continuations; tokens 3 to 5 come from drafts where those were accepted.
PROMPT = "<|im_start|>user\nMy name is"
SAMPLES = 3000
# 42 chi-square tests: a false alarm in fewer than 1 of 1,000 runs.
BOUND = 2e-5
SETTINGS = {
    "T=1": {"temperature": 1.0},
    "T=0.7 top-p 0.8": {"temperature": 0.7, "top_p": 0.8},
    "T=1.5 top-k 5 min-p 0.05": {"temperature": 1.5, "top_k": 5, "min_p": 0.05},
}


def draw(server, count, params, stride=None):
    """``count`` answers of five tokens, greedy neighbours in the same batches."""
    calls = [{"prompt": PROMPT, "max_new_tokens": 5, "ignore_eos": True, **params} for _ in range(count)]
    neighbour = {"prompt": chat("What is I-DLM?"), "max_new_tokens": 12, "temperature": 0}
    for place in range(0, len(calls), 25):
        calls.insert(place, neighbour)
    if stride is not None:
        calls = [{**c, "stride": stride} for c in calls]
    answers = server.batches(calls)
    greedy = {a["text"] for c, a in zip(calls, answers) if c["temperature"] == 0}
    assert len(greedy) == 1, "a greedy neighbour changed its answer"
    return [tuple(ids(a)) for c, a in zip(calls, answers) if c["temperature"] > 0]


def p_value(left, right, view):
    """Two-sample chi-square on ``view`` of each sample; cells below ten expected counts are pooled."""
    a, b = Counter(map(view, left)), Counter(map(view, right))
    cells = sorted(set(a) | set(b), key=lambda c: -(a[c] + b[c]))
    table, rest = [], [0, 0]
    for cell in cells:
        if a[cell] + b[cell] >= 20:
            table.append((a[cell], b[cell]))
        else:
            rest = [rest[0] + a[cell], rest[1] + b[cell]]
    if sum(rest) >= 20:
        table.append(tuple(rest))
    if len(table) < 2:
        return 1.0, len(table)
    return chi2_contingency(table, correction=False).pvalue, len(table)


VIEWS = {
    "token 1": lambda s: s[0],
    "token 2": lambda s: s[1],
    "token 3": lambda s: s[2],
    "token 4": lambda s: s[3],
    "pair 2,3": lambda s: s[1:3],
    "pair 3,4": lambda s: s[2:4],
    "pair 4,5": lambda s: s[3:5],
}


@pytest.fixture(scope="session")
def reference(ar):
    return {name: draw(ar, SAMPLES, params) for name, params in SETTINGS.items()}


def check(reference, samples, label):
    worst = 1.0
    for view, fn in VIEWS.items():
        p, cells = p_value(reference, samples, fn)
        print(f"{label} {view}: p = {p:.3f} over {cells} cells")
        worst = min(worst, p)
    return worst


@pytest.mark.parametrize("rule", ["isd", "isd_rejection"])
@pytest.mark.parity("sampling")
@pytest.mark.parametrize("name", SETTINGS)
def test_sampled_distribution_is_that_of_ar(reference, request, rule, name):
    """Seven chi-square tests per setting, on single tokens and on pairs; for the coupled rule under seeds the server draws, and for p/q."""
    server = request.getfixturevalue(rule)
    before = server.metrics()
    samples = draw(server, SAMPLES, SETTINGS[name], stride=4)
    after = server.metrics()
    accepted = sum(after[k] - before[k] for k in after if k.startswith("idlm:drafts_accepted"))
    assert accepted > SAMPLES / 4, "hardly a draft was accepted: the test would show nothing"
    assert check(reference[name], samples, f"{rule} {name}") > BOUND


@server_fixture
def biased(logs):
    """Every draft kept, one of the published shortcuts, in an otherwise equal server."""
    env = {"PYTHONPATH": with_pythonpath("biased"), "IDLM_SAMPLING_RULE": "rejection"}
    return Server("biased", CHECKPOINT, logs, "--speculative-algorithm", "ISD", env=env)


def test_a_biased_acceptance_rule_fails_the_same_test(reference, biased):
    name = "T=1.5 top-k 5 min-p 0.05"
    assert check(reference[name], draw(biased, SAMPLES, SETTINGS[name]), "biased") < BOUND


SEEDED = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 5, "min_p": 0.05},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.1},
]


def seeded_calls(count=60):
    texts = prompts(count, seed=81)
    return [{"prompt": p, "sampling_seed": 1000 + i, "max_new_tokens": 24, **SEEDED[i % len(SEEDED)]} for i, p in enumerate(texts)]


@pytest.fixture(scope="module")
def seeded_reference(ar):
    """AR with the plugin loaded, one request at a time."""
    return [ids(a) for a in ar.many(seeded_calls(), 1)]


@pytest.mark.parity("seed")
@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_a_seed_gives_the_same_tokens_at_any_stride(seeded_reference, isd, stride):
    got = [ids(a) for a in isd.many([{**c, "stride": stride} for c in seeded_calls()], 16)]
    same = sum(a == b for a, b in zip(seeded_reference, got))
    print(f"stride {stride}: {same}/{len(got)} seeded answers identical to AR")
    assert same == len(got)


@pytest.mark.parity("seed")
def test_a_seed_gives_the_same_tokens_in_any_batch_and_order(seeded_reference, ar, isd):
    """Unseeded, greedy and differently truncated neighbours, shuffled arrival; AR and ISD alike."""
    rng = random.Random(4)
    calls = [(i, c) for i, c in enumerate(seeded_calls())]
    mates = [(None, {"prompt": p, "max_new_tokens": 24, **rng.choice([*SEEDED, {"temperature": 0}])}) for p in prompts(40, seed=82)]
    for server in (ar, isd):
        order = calls + mates
        rng.shuffle(order)
        extra = [{}] if server is ar else [{"stride": s} for s in (2, 3, 4, 8, 16)]
        answers = server.many([{**c, **rng.choice(extra)} for _, c in order], 24)
        for (i, _), answer in zip(order, answers):
            assert i is None or ids(answer) == seeded_reference[i]


def test_different_seeds_differ_and_huge_or_negative_seeds_are_seeds(isd):
    got = {}
    for seed in (0, 1, -1, 2**31, 2**63 - 1, -(2**63)):
        pair = isd.many([{"prompt": PROMPT, "sampling_seed": seed, "temperature": 1.0, "max_new_tokens": 16, "ignore_eos": True}] * 2, 2)
        assert ids(pair[0]) == ids(pair[1])
        got[seed] = tuple(ids(pair[0]))
    assert len(set(got.values())) == len(got)


def test_unseeded_requests_differ_from_each_other(isd):
    # T = 2: at T = 1 one answer in fifty repeats a single token here, AR's and ISD's alike.
    answers = isd.many([{"prompt": PROMPT, "temperature": 2.0, "max_new_tokens": 16, "ignore_eos": True}] * 12, 12)
    assert len({tuple(ids(a)) for a in answers}) == len({a["meta_info"]["seed"] for a in answers}) == 12
