"""The speculative figures of an answer are what the decode forwards did for that one request."""

import itertools
import json
import re
import time

import pytest

from tests.server.harness import chat, ids, prompts

STORY = chat("Count from 1 to 30.")
GREEDY = {"temperature": 0, "max_new_tokens": 48, "ignore_eos": True}


def counted(server, ask):
    """``ask()`` and what the ``idlm:*`` counters, read right behind it, made of it."""
    before = server.metrics()
    answer = ask()
    after = server.metrics()
    delta = {k: after[k] - before.get(k, 0.0) for k in after}
    total = lambda *names: sum(v for k, v in delta.items() if k.startswith(tuple(f"idlm:{name}" for name in names)))
    drafts = {f"drafts_{what}_total": total(f"drafts_{what}_total", f"salvage_{what}_total") for what in ("proposed", "accepted")}
    return answer, {"tokens": delta["idlm:tokens_committed_total"], "rounds_total": total("rounds_total"), **drafts}


def behind_the_limit(answer, delta):
    """Drafts that the last forward accepted and the answer's end cut off."""
    return delta["drafts_accepted_total"] - answer["meta_info"]["spec_num_correct_drafts"]


def consistent(meta, tokens):
    """What must hold of any answer's figures; ``tokens`` is its length."""
    forwards, correct, proposed = meta["spec_verify_ct"], meta["spec_num_correct_drafts"], meta["spec_num_proposed_drafts"]
    histogram = meta["spec_correct_drafts_histogram"]
    assert sum(histogram) == forwards and sum(k * n for k, n in enumerate(histogram)) == correct
    assert meta["spec_accept_rate"] == (correct / proposed if proposed else 0.0)
    assert meta["spec_accept_length"] == pytest.approx((tokens - 1) / forwards)
    # Every forward commits its accepted drafts and one token more, unless the answer ends inside them.
    assert tokens - 1 - forwards <= correct <= tokens - forwards


@pytest.mark.parity("meta")
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_they_agree_with_the_counters_over_the_request(isd, stride, temperature):
    for prompt in [STORY, *prompts(5, seed=211)]:
        params = GREEDY | {"temperature": temperature}
        answer, delta = counted(isd, lambda: isd.generate(prompt, stride=stride, **params))
        meta = answer["meta_info"]
        consistent(meta, len(ids(answer)))
        assert delta["tokens"] == len(ids(answer)) - 1 == round(meta["spec_accept_length"] * meta["spec_verify_ct"])
        assert delta["rounds_total"] == meta["spec_verify_ct"]
        assert delta["drafts_proposed_total"] == meta["spec_num_proposed_drafts"]
        assert 0 <= behind_the_limit(answer, delta) < stride
        if stride == 1:
            assert meta["spec_num_proposed_drafts"] == meta["spec_accept_rate"] == 0 and meta["spec_accept_length"] == 1.0
        else:
            assert meta["spec_num_proposed_drafts"] <= (stride - 1) * meta["spec_verify_ct"]


def committed_per_forward(server, stride):
    """Tokens of STORY's greedy answer, and how many each decode forward committed, from a stream with one event per forward."""
    for _ in range(10):
        body = {"text": STORY, "stream": True, "sampling_params": GREEDY | {"custom_params": {"idlm_stride": stride}}}
        lines = [line for line in server.post("/generate", body, stream=True).iter_lines() if line.startswith(b"data: {")]
        events = [json.loads(line[6:]) for line in lines]
        if len(events) - 1 == events[-1]["meta_info"]["spec_verify_ct"]:  # else two steps shared an event
            lengths = [len(e["output_ids"]) for e in events]
            return ids(events[-1]), [b - a for a, b in itertools.pairwise(lengths)]
    raise AssertionError("no stream came with one event per forward")


@pytest.mark.parity("meta")
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_drafts_behind_a_stop_are_proposed_and_not_correct(isd, stride):
    tokens, steps = committed_per_forward(isd, stride)
    first_of_step = [1, *itertools.accumulate(steps, initial=1)][1:]
    inside = 0
    for place in [p for p in range(1, 40) if tokens.index(tokens[p]) == p]:
        params = GREEDY | {"ignore_eos": False, "stop_token_ids": [tokens[place]], "logit_bias": {"2": -100}}
        answer, delta = counted(isd, lambda: isd.generate(STORY, stride=stride, **params))
        assert ids(answer) == tokens[: place + 1]
        consistent(answer["meta_info"], place + 1)
        # The forward that committed the stop, and the accepted drafts of all forwards up to and including it.
        last = max(i for i, start in enumerate(first_of_step[:-1]) if start <= place)
        kept = place + 1 - first_of_step[last]
        correct = sum(n - 1 for n in steps[:last]) + min(steps[last] - 1, kept)
        assert answer["meta_info"]["spec_verify_ct"] == last + 1 == delta["rounds_total"]
        assert answer["meta_info"]["spec_num_correct_drafts"] == correct
        assert answer["meta_info"]["spec_num_proposed_drafts"] == delta["drafts_proposed_total"]
        assert delta["drafts_accepted_total"] == sum(n - 1 for n in steps[: last + 1])
        inside += kept < steps[last]
    print(f"stride {stride}: {inside} stops inside an accepted run")
    assert inside >= 2


def test_an_answer_of_one_token_has_none(isd):
    meta = isd.generate(STORY, temperature=0, max_new_tokens=1)["meta_info"]
    assert not [k for k in meta if k.startswith("spec_")]


@pytest.mark.parity("meta")
@pytest.mark.parametrize("stride", [1, 4, 8])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_openai_answers_carry_them(isd, path, stride):
    prompt = {"messages": [{"role": "user", "content": "Count from 1 to 30."}]} if "chat" in path else {"prompt": STORY}
    body = {"model": "default", "temperature": 0, "max_tokens": 40, "return_spec_tokens_details": True, "custom_params": {"idlm_stride": stride}, **prompt}
    reply, delta = counted(isd, lambda: isd.post(path, body).json())
    details = reply["sglext"]["spec_tokens_details"]
    consistent(details, reply["usage"]["completion_tokens"])
    assert (details["spec_verify_ct"], details["spec_num_proposed_drafts"]) == (delta["rounds_total"], delta["drafts_proposed_total"])
    streamed = isd.post(path, {**body, "stream": True}, stream=True).iter_lines()
    last = [json.loads(line[6:]) for line in streamed if line.startswith(b"data: {") and b"spec_tokens_details" in line][-1]
    assert last["sglext"]["spec_tokens_details"] == details


def test_the_server_s_own_accept_rate_is_that_of_the_drafts(isd_rejection):
    """With a log line per step: their lengths add up to the tokens, their rates to the accepted drafts."""
    calls = [{"temperature": 0, "max_new_tokens": 48, "ignore_eos": True, "stride": n} for n in (4, 8, 1)]
    for call in calls:
        place = len(isd_rejection.log.read_bytes())
        answer, delta = counted(isd_rejection, lambda: isd_rejection.generate(STORY, **call))
        time.sleep(0.5)  # the overlap schedule's extra step
        lines = isd_rejection.log.read_bytes()[place:].decode(errors="replace")
        found = [(float(n), float(r)) for n, r in re.findall(r"accept len: ([\d.]+), accept rate: ([\d.]+)", lines)]
        assert sum(n for n, _ in found) == delta["tokens"]
        # A step of one request proposes up to N - 1 drafts; the line has two decimals. The last one may be cut by the limit.
        shares = {(n, round((n - 1) / p, 2)) for n in range(1, call["stride"] + 1) for p in range(max(n - 1, 1), max(call["stride"], 2))}
        *whole, last = [(n, r) for n, r in found if n]
        run = delta["drafts_accepted_total"] - sum(n - 1 for n, _ in whole)
        assert set(whole) <= shares and (run + 1, last[1]) in shares
    state = isd_rejection.info()["internal_states"][0]
    assert state["avg_spec_accept_length"] == pytest.approx(state["idlm"]["tokens_per_forward"])
