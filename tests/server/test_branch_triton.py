"""Branch rounds on SGLang's Triton attention, with the overlap schedule and requests that are retracted.

Answers are AR's, rounds those of the CPU's own attention.

Interpreted where there is no GPU, which is slow: requests are few and short, and chosen for the survivors that stand in their answers.
"""

import re

import pytest

from idlm_sglang.platform import accelerator_available
from tests.server.fleet import server_fixture
from tests.server.harness import CHECKPOINT, Server, differing, held_out_prompts, ids, prompts

CHOSEN = [prompts(40, seed=3)[i] for i in (30, 11, 7, 39, 24, 0)] + [held_out_prompts(41)[i] for i in (0, 10)]
SHORT = {"max_new_tokens": 20}


@server_fixture
def branch(logs):
    env = {"IDLM_SALVAGE": "branch", "IDLM_MAX_STRIDE": "8", "SGLANG_IS_IN_CI": "1", **({} if accelerator_available() else {"TRITON_INTERPRET": "1"})}
    # Every 12th forward all requests but one are retracted.
    env |= {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "12"}
    flags = ["--attention-backend", "triton", "--enable-metrics", "--disable-radix-cache"]
    return Server("branch", CHECKPOINT, logs, "--speculative-algorithm", "ISD", *flags, env=env)


def survivors(server) -> tuple[float, float]:
    """Proposed and accepted so far."""
    found = server.metrics()
    return tuple(sum(value for name, value in found.items() if name.startswith(f"idlm:salvage_{kind}_total")) for kind in ("proposed", "accepted"))


def same(ar, branch, calls):
    before = survivors(branch)
    got, want = branch.many([{**call, "stride": (8, 4)[i % 2]} for i, call in enumerate(calls)], len(calls)), ar.many(calls, len(calls))
    proposed, accepted = (now - then for now, then in zip(survivors(branch), before))
    print(f"{len(calls)} answers, {accepted:.0f} of {proposed:.0f} survivors accepted")
    assert not differing(want, got)
    assert accepted > 5, "without survivors in the answers the run shows nothing"
    return want


def test_greedy_and_seeded_answers_are_ars_wherever_they_stop(ar, branch):
    greedy = [{"prompt": p, "temperature": 0, **SHORT} for p in CHOSEN]
    plain = same(ar, branch, greedy)
    # A stop in the middle of what a run may accept.
    stopped = [{**call, "stop_token_ids": [ids(answer)[len(ids(answer)) // 2]]} for call, answer in zip(greedy, plain)]
    same(ar, branch, stopped[:4] + [{"prompt": p, "temperature": 0.8, "sampling_seed": 21 + i, **SHORT} for i, p in enumerate(CHOSEN[2:6])])
    assert re.search("#retracted_reqs: [1-9]", branch.log.read_text(errors="replace"))


def test_a_mask_has_room_for_a_request_that_ended_before_the_step(ar, branch):
    """A grammar makes SGLang wait for the result before a step that it has prepared: a long request that ends by it has given its columns back."""
    long = {"prompt": " ".join(prompts(30, seed=5)), "temperature": 0, "max_new_tokens": 8}
    first = ids(ar.many([{**long, "max_new_tokens": 1}], 1)[0])[0]
    calls = [{**long, "stop_token_ids": [first]}, {"prompt": CHOSEN[0], "temperature": 0, "max_new_tokens": 24, "regex": "[a-z ]{20,60}"}]
    want, got = (server.batches(calls) for server in (ar, branch))
    assert not differing(want, got) and got[0]["meta_info"]["completion_tokens"] == 1


@pytest.mark.skipif(accelerator_available(), reason="where the CPU's own attention is")
def test_every_round_accepts_what_it_accepts_on_the_cpus_own_attention(isd, branch):
    """The answers above do not depend on what MASK rows see; their drafts do."""
    rounds = 0
    for prompt in CHOSEN[1:5]:
        ask = {"text": prompt, "sampling_params": {"temperature": 0, **SHORT, "custom_params": {"idlm_stride": 8, "idlm_trace": True}}}
        got, want = (server.post("/generate", ask).json() for server in (branch, isd))
        trace = got["meta_info"]["idlm_trace"]
        assert ids(got) == ids(want) and trace == want["meta_info"]["idlm_trace"]
        rounds += sum(kind == "salvage" for _, kind, *_ in trace)
    assert rounds > 5
    print(f"{rounds} rounds behind a rejection")


def test_the_mask_is_that_of_the_triton_backend(branch):
    info = branch.info()
    assert info["attention_backend"] == "triton" and not info["disable_overlap_schedule"]
    assert "salvage branch" in branch.log.read_text(errors="replace")
