"""Penalties and grammars at full stride: exactly AR's tokens, in any company, and more than one of them per forward."""

import json

import pytest

from tests.server.harness import chat, differing, held_out_prompts, ids, prompts

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "state": {"enum": ["pending", "accepted", "rejected"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "state", "n"],
    }
)
EBNF = 'root ::= ("yes" | "no") ", " [a-z]{3,12} "."'
PENALTIES = [
    {"presence_penalty": 0.9},
    {"frequency_penalty": 0.7},
    {"repetition_penalty": 1.3},
    {"min_new_tokens": 35},
    {"presence_penalty": 1.5, "frequency_penalty": -0.4, "repetition_penalty": 0.8, "min_new_tokens": 20},
    {"presence_penalty": 0.6, "repetition_penalty": 1.1, "logit_bias": {"9": 3.0}},
]
GRAMMARS = [{"regex": "[a-z ]{10,30}"}, {"json_schema": SCHEMA}, {"ebnf": EBNF}, {"regex": "(the |quiet |river ){3,9}"}]
GRAMMAR_KEYS = {"regex", "json_schema", "ebnf"}
BOTH = [{"json_schema": SCHEMA, "presence_penalty": 0.8}, {"regex": "[0-9a-f]{16}", "frequency_penalty": 1.0, "repetition_penalty": 1.2}]


def mixed(count: int, seed: int) -> list[dict]:
    """Greedy and seeded calls that mix penalties, grammars, both, and neither."""
    kinds = [*PENALTIES, *GRAMMARS, *BOTH, {}, {}]
    ways = [{"temperature": 0}, {"temperature": 0}, {"temperature": 0.9, "sampling_seed": 11}, {"temperature": 0.7, "top_p": 0.9, "sampling_seed": 12}]
    texts = prompts(count, seed=seed)
    return [{"prompt": t, "max_new_tokens": 48, **ways[i % 4], **kinds[i % len(kinds)]} for i, t in enumerate(texts)]


@pytest.fixture(scope="session")  # tests of other servers come between
def wanted(ar):
    calls = mixed(126, seed=301)
    return calls, ar.many(calls, 8)


@pytest.mark.parity("penalties", "grammar")
@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_overlapped_and_in_any_company(wanted, isd, stride):
    calls, want = wanted
    got = isd.many([{**c, "stride": stride} for c in calls], 16)
    assert not differing(want, got)
    assert not any(3 in ids(a) for a in got), "MASK was emitted"


@pytest.mark.parity("penalties", "grammar")
def test_strides_mixed_in_one_batch_without_overlap(wanted, isd_sync):
    calls, want = wanted
    assert not differing(want, isd_sync.many([{**c, "stride": 1 + i % 8} for i, c in enumerate(calls)], 16))


@pytest.mark.parity("penalties", "grammar")
def test_through_retraction_and_mixed_chunks(ar, isd_tight):
    """The KV pool is too small for the load: penalised and constrained requests are interrupted and resumed."""
    # Long answers that the scheduler does not know to be long (it would for ignore_eos).
    kinds = [*PENALTIES, {"regex": "[a-z ]{100,140}"}, {"regex": "[a-z ]{100,140}", "presence_penalty": 0.7}]
    endless = {"max_new_tokens": 120, "min_new_tokens": 110}
    ways = [{"temperature": 0}, {"temperature": 0.9, "sampling_seed": 11}]
    calls = [{"prompt": p, **ways[i % 2], **kinds[i % len(kinds)], **endless} for i, p in enumerate(prompts(80, seed=303))]
    want, got = ar.many(calls, 8), isd_tight.many(calls, 24)
    retracted = sum(a["meta_info"]["num_retractions"] > 0 for a in got)
    print(f"{retracted} of {len(got)} requests were retracted")
    assert retracted >= 3
    assert not differing(want, got)


@pytest.mark.parametrize("extra", [{"presence_penalty": 0.3}, {"json_schema": SCHEMA}, {"regex": "(the |quiet |river ){3,9}"}, {"ebnf": EBNF}])
def test_they_are_strided(isd, extra):
    before = isd.info()["internal_states"][0]["idlm"]
    isd.many([{"prompt": p, "temperature": 0, "max_new_tokens": 64, "stride": 4, **extra} for p in held_out_prompts(12)], 4)
    after = isd.info()["internal_states"][0]["idlm"]
    rounds = sum(after["rounds"].values()) - sum(before["rounds"].values())
    tpf = (after["tokens_committed"] - before["tokens_committed"]) / rounds
    print(f"{extra}: {tpf:.2f} tokens per forward")
    assert tpf > 1.3 and after["rounds"]["single"] == before["rounds"]["single"]


@pytest.mark.parity("grammar")
def test_a_grammar_s_answer_is_valid_when_sampled(isd):
    shape = r'\{"name":"[a-z]{1,8}","state":"(pending|accepted)","n":[1-9][0-9]?\}'
    answers = isd.many([{"prompt": chat("Describe the request."), "temperature": 1.2, "max_new_tokens": 96, "regex": shape}] * 24, 12)
    assert len({a["text"] for a in answers}) > 12
    for answer in answers:
        assert answer["meta_info"]["finish_reason"]["type"] == "stop"
        assert set(json.loads(answer["text"])) == {"name", "state", "n"}


@pytest.mark.parity("grammar")
def test_a_grammar_that_has_ended_goes_on_as_in_ar(ar, isd):
    """ignore_eos behind a complete grammar: nothing constrains what follows."""
    calls = [{"prompt": p, "temperature": 0, "max_new_tokens": 24, "ignore_eos": True, "regex": "[a-z]{3}"} for p in prompts(6, seed=302)]
    want = ar.many(calls, 3)
    for stride in (1, 4, 8):
        assert not differing(want, isd.many([{**c, "stride": stride} for c in calls], 3)), stride


@pytest.mark.parity("grammar")
def test_a_token_that_ends_an_answer_against_its_grammar_is_an_answer_as_in_ar(ar, isd):
    """Every token is held back, by the grammar or by min_new_tokens: what is left is token 0, and it is an end token here."""
    last = ids(ar.generate("x", temperature=0, max_new_tokens=1, regex="c"))[0]
    blocked = {"regex": "ab{9}c", "min_new_tokens": 24, "stop_token_ids": [last, 0], "max_new_tokens": 40}
    calls = [{"prompt": p, "temperature": 0, **blocked} for p in prompts(4, seed=305)]
    want = ar.many(calls, 4)
    assert all(a["meta_info"]["finish_reason"]["type"] == "stop" for a in want)
    for stride in (1, 4, 8):
        assert not differing(want, isd.many([{**c, "stride": stride} for c in calls], 4)), stride


def test_figures_stay_numbers_where_no_token_is_allowed(isd):
    """A forced draft that min_new_tokens forbids: the row has no distribution."""
    last = ids(isd.generate("x", temperature=0, max_new_tokens=1, regex=";"))[0]
    params = {"temperature": 1.0, "max_new_tokens": 16, "regex": "a;;;;;;;;b", "min_new_tokens": 9, "stop_token_ids": [last]}
    for _ in range(3):
        isd.post("/generate", {"text": "Hi", "sampling_params": params})
    assert isd.alive() and isd.info()["internal_states"][0]["idlm"]["introspective_acceptance"] > 0
    assert all(value == value for value in isd.metrics().values())
