"""What a request gets is decided from the request alone."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
from sglang.srt.sampling.sampling_params import SamplingParams

from idlm_sglang.config import Settings
from idlm_sglang.engine.admission import plan_of, plan_request
from idlm_sglang.engine.report import report, reported_seed
from idlm_sglang.engine.requests import BatchRows, derived_seed, stride_limit

SETTINGS = Settings(stride=4, max_stride=8, auto=False)
VOCAB = 32
PROCESSOR = DisallowedTokensLogitsProcessor.to_str()


def request(hidden=False, lora=None, mask=False, grammar=None, processor=None, **params):
    return SimpleNamespace(
        sampling_params=SamplingParams(**params),
        return_hidden_states=hidden,
        lora_id=lora,
        return_sampling_mask=mask,
        grammar=grammar,
        custom_logit_processor=processor,
    )


@pytest.mark.parametrize(
    "req, mode, reason",
    [
        (request(), "strided", "default"),
        (request(temperature=0.7, top_p=0.9, min_p=0.1, sampling_seed=3, logit_bias={"5": 1.0}), "strided", "default"),
        (request(custom_params={"idlm_stride": 2}), "strided", "stride"),
        (request(presence_penalty=0.1, frequency_penalty=0.1, repetition_penalty=1.1, min_new_tokens=2), "strided", "default"),
        (request(regex="a+"), "strided", "default"),
        (request(grammar=object()), "strided", "default"),
        (request(regex="a+", processor=PROCESSOR), "single", "custom_logit_processor"),
        (request(processor=PROCESSOR), "single", "custom_logit_processor"),
        (request(custom_params={"idlm_stride": 1, "idlm_selfcheck": True}), "strided", "selfcheck"),
        (request(processor=PROCESSOR, custom_params={"idlm_stride": 1, "idlm_selfcheck": True}), "single", "selfcheck"),
        (request(custom_params={"idlm_stride": 9, "idlm_selfcheck": True}), "refused", "stride"),
        (request(hidden=True), "refused", "hidden_states"),
        (request(hidden="last"), "refused", "hidden_states"),
        (request(lora="x"), "refused", "lora"),
        (request(mask=True), "refused", "sampling_mask"),
        (request(beam_width=2), "refused", "beam_search"),
        (request(processor="no processor"), "refused", "custom_logit_processor"),
        (request(beam_width=1), "strided", "default"),
        (request(custom_params={"idlm_stride": 9}), "refused", "stride"),
        (request(custom_params={"idlm_stride": 0}), "refused", "stride"),
        (request(custom_params={"idlm_stride": True}), "refused", "stride"),
        (request(custom_params={"idlm_stride": "2"}), "refused", "stride"),
        (request(custom_params=[1]), "refused", "custom_params"),
        (request(custom_params="idlm_stride"), "refused", "custom_params"),
        (request(top_k=2**40), "refused", "top_k"),
        (request(logit_bias={"3": 1e39}), "refused", "logit_bias"),
        (request(logit_bias={"3": float("nan")}), "refused", "logit_bias"),
        (request(logit_bias={"3": "much"}), "refused", "unreadable"),
    ],
)
def test_modes(req, mode, reason):
    plan = plan_request(req, SETTINGS, 1)
    assert (plan.mode, plan.reason) == (mode, reason)
    assert bool(plan.message) == (mode == "refused")


@pytest.mark.parametrize("req", [request(regex="a+"), request(json_schema="{}"), request(grammar=object())])
def test_a_grammar_that_cannot_be_rolled_back_is_followed_one_token_per_step(req):
    plan = plan_request(req, Settings(stride=4, max_stride=8, auto=False, strided_grammars=False), 1)
    assert (plan.mode, plan.reason) == ("single", "grammar")


def test_a_request_is_planned_once_and_numbered_in_order():
    first, second = request(), request()
    plan = plan_of(first, SETTINGS, 1)
    assert plan_of(first, SETTINGS, 1) is plan
    assert plan_of(second, SETTINGS, 1).number > plan.number


def test_limits_follow_the_request_the_server_and_the_mode():
    assert stride_limit(plan_request(request(), SETTINGS, 1), SETTINGS, 4) == 3
    assert stride_limit(plan_request(request(), SETTINGS, 1), SETTINGS, 1) == 0
    assert stride_limit(plan_request(request(custom_params={"idlm_stride": 8}), SETTINGS, 1), SETTINGS, 1) == 7
    assert stride_limit(plan_request(request(processor=PROCESSOR), SETTINGS, 1), SETTINGS, 4) == 0


def test_a_client_s_seed_is_kept_and_derived_seeds_do_not_repeat():
    assert plan_request(request(sampling_seed=-7), SETTINGS, 1).seed == -7
    seeds = {derived_seed(s, n) for s in (0, 1, 42) for n in range(5000)}
    assert len(seeds) == 15000 and all(0 <= s < 2**53 for s in seeds)
    assert max(seeds) > 2**52 and all(json.loads(json.dumps(float(s))) == s for s in seeds), "every drawn seed survives a double"


def test_batch_rows_say_what_the_step_needs():
    reqs = [request(temperature=0), request(temperature=1.0, sampling_seed=5), request(temperature=1.0, top_p=0.5)]
    for r in reqs:
        r.sampling_params.normalize(None)
    rejection = replace(SETTINGS, sampling_rule="rejection")
    plans = [plan_request(r, rejection, 1) for r in reqs]
    rows = BatchRows(reqs, plans, rejection, 4, VOCAB, "cpu")
    assert rows.limits.tolist() == [3, 3, 3] and rows.drafts == 3
    assert rows.coupled.tolist() == [False, True, False]
    assert (rows.any_sampled, rows.flags["any_truncated"], rows.any_rejection) == (True, True, True)
    greedy = BatchRows(reqs[:1], plans[:1], SETTINGS, 4, VOCAB, "cpu")
    assert (greedy.any_sampled, greedy.flags["any_truncated"], greedy.any_rejection) == (False, False, False)
    seeded = BatchRows(reqs[:2], plans[:2], SETTINGS, 4, VOCAB, "cpu")
    assert (seeded.flags["any_truncated"], seeded.any_rejection) == (False, False)
    unseeded = BatchRows(reqs, [plan_request(r, SETTINGS, 1) for r in reqs], SETTINGS, 4, VOCAB, "cpu")
    assert unseeded.coupled.tolist() == [True] * 3 and not unseeded.any_rejection, "coupled is the rule unless another is set"


@pytest.mark.parametrize(
    "rule, params, replayable",
    [
        ("coupled", {"temperature": 1.0}, True),
        ("coupled", {"temperature": 1.0, "sampling_seed": 5}, True),
        ("coupled", {"temperature": 0}, False),
        ("rejection", {"temperature": 1.0}, False),
        ("rejection", {"temperature": 1.0, "sampling_seed": 5}, True),
        ("coupled", {"temperature": 1.0, "custom_params": {"idlm_stride": 99}}, False),
    ],
)
def test_a_seed_is_reported_exactly_where_it_reproduces_the_answer(rule, params, replayable):
    req = request(**params)
    req.sampling_params.normalize(None)
    plan = plan_of(req, replace(SETTINGS, sampling_rule=rule), 1)
    assert reported_seed(req) == (plan.seed if replayable else None)
    assert report(req) == ({"seed": plan.seed} if replayable else {})


def test_a_grammar_request_uses_the_coupled_rule():
    """Its drafts are looked at before they are tried."""
    req = request(temperature=1.0, grammar=object())
    req.sampling_params.normalize(None)
    rejection = replace(SETTINGS, sampling_rule="rejection")
    rows = BatchRows([req], [plan_request(req, rejection, 1)], rejection, 4, VOCAB, "cpu")
    assert rows.coupled.tolist() == [True] and not rows.any_rejection and rows.grammars == [0]
