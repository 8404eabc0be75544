"""The idlm:* series say what happened, and the shipped checkpoint decodes several tokens per forward."""

import pytest

from tests.server.harness import held_out_prompts, ids, prompts


def change(server, calls, clients=8):
    before = server.metrics()
    answers = server.many(calls, clients)
    after = server.metrics()
    return answers, {k: after[k] - before.get(k, 0.0) for k in after}


def total(delta, prefix):
    return sum(v for k, v in delta.items() if k.startswith(prefix))


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_counts_agree_with_the_answers(isd, stride):
    """Behind stops inside a run, limits, and the overlap schedule's extra step."""
    texts = prompts(40, seed=91)
    calls = [{"prompt": p, "stride": stride, "temperature": 0, "max_new_tokens": 1 + i} for i, p in enumerate(texts)]
    calls += [{"prompt": p, "stride": stride, "temperature": 0, "max_new_tokens": 40, "stop": ["e"]} for p in texts]
    answers, delta = change(isd, calls)
    # The first token of an answer comes from the prefill. A stop string can end an answer inside a token run.
    decoded = sum(len(ids(a)) - 1 for a in answers)
    assert delta["idlm:tokens_committed_total"] == decoded
    rounds = {kind: delta[f'idlm:rounds_total{{kind="{kind}"}}'] for kind in ("verify", "salvage", "cold", "single")}
    assert sum(rounds.values()) == sum(a["meta_info"].get("spec_verify_ct", 0) for a in answers)
    if stride == 1:
        assert rounds["verify"] == rounds["salvage"] == rounds["cold"] == 0
        assert decoded == rounds["single"]
    else:
        assert rounds["single"] == 0
        assert delta['idlm:drafts_proposed_total{position="1"}'] == rounds["verify"]
        assert delta['idlm:salvage_proposed_total{position="1"}'] == rounds["salvage"] > 0
        for j in range(1, stride):
            # Behind a branch fewer than K drafts are ahead; survivors always are K.
            for series, kind in (("drafts", "verify"), ("salvage", "salvage")):
                proposed, accepted = (delta[f'idlm:{series}_{w}_total{{position="{j}"}}'] for w in ("proposed", "accepted"))
                assert accepted <= proposed <= rounds[kind] and (kind == "verify" or proposed == rounds[kind])
        assert delta.get(f'idlm:drafts_proposed_total{{position="{stride}"}}', 0) == 0
        run = sum(delta[f'idlm:{series}_accepted_total{{position="{j}"}}'] for series in ("drafts", "salvage") for j in range(1, stride))
        # A forward commits what it accepted and one more token, unless a stop or a limit cuts it.
        assert decoded <= run + sum(rounds.values()) and run > 0
        mean = delta["idlm:introspective_acceptance_sum_total"] / delta["idlm:introspective_acceptance_count_total"]
        assert 0 < mean <= 1
    assert delta['idlm:requests_total{mode="strided",reason="stride"}'] == len(calls)


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1, "sampling_seed": 5}, {"temperature": 0.8, "top_k": 9, "logit_bias": {"7": 1.5}}])
def test_the_first_decode_step_has_drafts(isd, params):
    """MASK rows behind the prompt draw them, for prompts that are new, cached and prefilled together."""
    texts = prompts(24, seed=17)
    calls = [{"prompt": p, "stride": 4, "max_new_tokens": 3, "ignore_eos": True, **params} for p in texts + texts]
    _, delta = change(isd, calls)
    proposed, accepted, beyond = (delta[f"idlm:drafts_{name}"] for name in ('proposed_total{position="1"}', 'accepted_total{position="1"}', 'proposed_total{position="2"}'))
    print(f"{params}: {accepted:.0f} of {proposed:.0f} first drafts accepted")
    assert proposed == len(calls) and accepted > 0.2 * proposed
    assert beyond == 0, "the prefill's own token and one behind a draft leave room for one"
    # One step that tries the draft; where it fell, another, with survivors or without drafts.
    assert delta['idlm:rounds_total{kind="verify"}'] == len(calls)
    assert delta['idlm:rounds_total{kind="cold"}'] + delta['idlm:rounds_total{kind="salvage"}'] == len(calls) - accepted
    two_tokens, delta = change(isd, [{**call, "max_new_tokens": 2} for call in calls])
    assert delta['idlm:rounds_total{kind="cold"}'] == total(delta, "idlm:rounds_total") == len(two_tokens), "a draft would be of no use"
    one_token, delta = change(isd, [{**call, "max_new_tokens": 1} for call in calls])
    assert len(one_token) == len(calls) and total(delta, "idlm:rounds_total") == 0


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("stride", [2, 3, 4, 8])
def test_tokens_per_forward_on_prompts_kept_out_of_training(isd, stride, temperature):
    calls = [{"prompt": p, "stride": stride, "temperature": temperature, "max_new_tokens": 160} for p in held_out_prompts(60)]
    answers, delta = change(isd, calls)
    rounds = total(delta, "idlm:rounds_total")
    from_metrics = delta["idlm:tokens_committed_total"] / rounds
    from_answers = sum(len(ids(a)) - 1 for a in answers) / sum(a["meta_info"].get("spec_verify_ct", 0) for a in answers)
    print(f"N = {stride}, T = {temperature}: {from_metrics:.2f} tokens per forward (from /metrics {from_metrics:.3f}, from answers {from_answers:.3f})")
    assert from_metrics == pytest.approx(from_answers)
    if stride == 4 and temperature == 0:
        assert from_metrics >= 3.0


def test_server_info_reports_the_counters(isd):
    state = isd.info()["internal_states"][0]["idlm"]
    assert state["stride"] == 4 and state["max_stride"] == 16
    assert state["tokens_committed"] == isd.metrics()["idlm:tokens_committed_total"]
