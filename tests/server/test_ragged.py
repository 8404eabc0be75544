"""Rows that a step leaves out (ragged verify): answers are AR's at every stride, wherever they end, from fewer rows."""

import random

import pytest

from idlm_sglang.platform import accelerator_available
from tests.server.fleet import server_fixture
from tests.server.harness import CHECKPOINT, Server, differing, held_out_prompts, ids, prompts

pytestmark = pytest.mark.skipif(accelerator_available(), reason="a GPU's steps have a fixed width")


@server_fixture
def ragged(logs):
    """Rows left out, which is a CPU's default, with the overlap schedule, pages of 32 and requests that are retracted."""
    env = {"IDLM_MAX_STRIDE": "16", "SGLANG_IS_IN_CI": "1", "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "60"}
    return Server("ragged", CHECKPOINT, logs, "--speculative-algorithm", "ISD", "--enable-metrics", "--disable-radix-cache", "--page-size", "32", env=env)


def counts(server) -> dict[str, float]:
    found = server.metrics()
    rounds = sum(value for name, value in found.items() if name.startswith("idlm:rounds_total"))
    return {"rows": found["idlm:rows_total"], "rounds": rounds, "tokens": found["idlm:tokens_committed_total"]}


def per_round(server, calls, clients: int = 12) -> tuple[list[dict], float, float]:
    """The answers, and rows and tokens per round."""
    before = counts(server)
    answers = server.many(calls, clients)
    now = counts(server)
    gained = {name: now[name] - before[name] for name in now}
    return answers, gained["rows"] / gained["rounds"], gained["tokens"] / gained["rounds"]


def test_greedy_answers_are_ars_from_fewer_rows_and_hardly_more_rounds(ar, isd, ragged):
    calls = [{"prompt": p, "temperature": 0, "max_new_tokens": 120} for p in held_out_prompts(60, seed=23)]
    want = ar.many(calls, 12)
    for stride in (2, 4, 8, 16):
        here = [{**call, "stride": stride} for call in calls]
        (got, rows, tokens), (whole, all_rows, all_tokens) = per_round(ragged, here), per_round(isd, here)
        print(f"N = {stride}: {rows:.1f} of {all_rows:.1f} rows and {tokens:.2f} of {all_tokens:.2f} tokens a round")
        assert not differing(want, got) and not differing(want, whole)
        assert all_rows == 2 * stride - 1 and rows < {2: 1, 4: 0.99, 8: 0.93, 16: 0.93}[stride] * all_rows
        assert tokens > 0.9 * all_tokens


@pytest.mark.parametrize("stride", [4, 16])
def test_answers_are_ars_wherever_they_end(ar, ragged, stride):
    """Stops of the request's own in the middle of runs, ends that are ignored, or put off, and every length."""
    rng, texts = random.Random(stride), prompts(48, seed=stride)
    calls = [{"prompt": p, "temperature": 0, "max_new_tokens": 1 + i} for i, p in enumerate(texts)]
    plain = ar.many(calls, 12)
    for i, (call, answer) in enumerate(zip(calls, plain)):
        call |= {"stop_token_ids": [rng.choice(ids(answer))]} if i % 4 == 0 else {}
        call |= {"ignore_eos": True} if i % 4 == 1 else {}
        call |= {"min_new_tokens": rng.randrange(1 + i)} if i % 4 == 2 else {}
        call |= {"temperature": 0.9, "sampling_seed": i, "top_k": 20} if i % 3 == 0 else {}
        call |= {"return_logprob": True} if i % 5 == 0 else {}
    assert not differing(ar.many(calls, 12), ragged.many([{**call, "stride": stride} for call in calls], 12))


def test_a_step_behind_a_cold_one_or_at_the_end_has_no_row_too_many(ragged):
    """One token left is one row; a token that the answer's last step gives needs no MASK."""
    calls = [{"prompt": p, "temperature": 0, "ignore_eos": True, "max_new_tokens": 2, "stride": 16} for p in prompts(12, seed=2)]
    answers, rows, tokens = per_round(ragged, calls)
    assert all(len(ids(a)) == 2 for a in answers) and rows == tokens == 1


def test_what_a_request_leaves_out_does_not_depend_on_its_company(ragged):
    """Also a step that left nothing out says how sure its drafts are."""
    calls = [{"prompt": p, "temperature": 0, "max_new_tokens": 120, "stride": 4} for p in prompts(40, seed=6)]
    (_, alone, _), (_, together, _) = (per_round(ragged, calls, clients) for clients in (1, 12))
    print(f"{alone:.2f} rows a round alone, {together:.2f} together")
    # SGLang's switch retracts now and then, and the forward that follows has other first drafts.
    assert alone == pytest.approx(together, rel=0.02)


@pytest.mark.parametrize("stride", [4, 16])
def test_grammars_are_walked_over_what_is_verified(ar, ragged, stride):
    schema = '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}}, "required": ["name", "age"]}'
    kinds = [{"json_schema": schema}, {"regex": "(yes|no), [a-z]{3,9}( [a-z]{2,8}){1,6}\\."}, {}]
    calls = [{"prompt": p, "temperature": 0, "max_new_tokens": 5 + 2 * i, **kinds[i % 3]} for i, p in enumerate(prompts(24, seed=31))]
    for i, call in enumerate(calls):
        call |= {"temperature": 0.9, "sampling_seed": i} if i % 2 else {}
    assert not differing(ar.many(calls, 12), ragged.many([{**call, "stride": stride} for call in calls], 12))


def test_a_request_that_allows_no_token_costs_nobody_else_anything(ar, ragged):
    """Every token ends it and none may: SGLang takes all logits away, and how sure a draft is is not a number."""
    none = {"temperature": 0, "max_new_tokens": 30, "ignore_eos": True, "min_new_tokens": 25, "stop_token_ids": list(range(1024))}
    calls = [{"prompt": p, "temperature": 0, "max_new_tokens": 40, **(none if i % 3 == 0 else {})} for i, p in enumerate(prompts(12, seed=12))]
    for stride in (4, 8):
        assert not differing(ar.many(calls, 12), ragged.many([{**call, "stride": stride} for call in calls], 12))
