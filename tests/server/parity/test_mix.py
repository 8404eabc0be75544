"""Several hundred requests that mix features at random get from ISD what AR gives them, field by field."""

import json

import pytest

from tests.server.parity.cases import FEATURES, STRIDES
from tests.server.parity.compare import differences
from tests.server.parity.conftest import answers

KEYS = {"reasoning": "tools"}  # features that share a row of the table


def stride(case):
    custom = case.body.get("custom_params") or {}
    params = case.body.get("sampling_params")
    if isinstance(params, list):
        params = params[0]
    return (custom or (params or {}).get("custom_params") or {}).get("idlm_stride")


def report(cases, want, got):
    """One paragraph per case that differs."""
    found = []
    for case, a, b in zip(cases, want, got, strict=True):
        lines = differences(a, b, case.exact)
        if lines:
            body = json.dumps({k: v for k, v in case.body.items() if k != "custom_logit_processor"})
            found.append("\n  ".join([f"case {case.number} {case.path} {sorted(case.features)} {body[:600]}", *lines[:6]]))
    return found


@pytest.mark.parametrize("arm", ["overlapped", "synchronous"])
@pytest.mark.parametrize("feature", [pytest.param(name, marks=pytest.mark.parity(KEYS.get(name, name))) for name in [*FEATURES, "endpoints"]])
def test_mixed_requests_get_what_ar_gives(request, mix, expected, arm, feature):
    """All cases run in the same batches; each feature has its own verdict."""
    got = request.getfixturevalue(arm)
    chosen = [i for i, case in enumerate(mix) if feature in case.features]
    assert len(chosen) >= 25
    found = report(*([some[i] for i in chosen] for some in (mix, expected, got)))
    print(f"{feature} {arm}: {len(chosen) - len(found)}/{len(chosen)} as AR")
    assert not found, "\n".join([f"{len(found)} of {len(chosen)} differ", *found[:5]])


def test_the_mix_covers_every_feature_at_every_stride(mix, expected):
    for feature in FEATURES:
        having = [case for case in mix if feature in case.features]
        assert {stride(case) for case in having} == {None, *STRIDES}
        assert {case.streamed for case in having} == {True, False}
    served = sum(answer.status == 200 for answer in expected)
    print(f"{len(mix)} cases, {sum(c.exact for c in mix)} of them determined, {served} answered 200")
    assert served > 0.95 * len(mix), "refusals show little"


def test_ar_ignores_the_stride(ar, mix, expected):
    """The AR arm gets the bodies with ``custom_params``: they must be what it answers without."""
    some = [i for i, case in enumerate(mix) if case.exact and stride(case) and "custom_processors" not in case.features and not case.streamed][:40]
    plain = []
    for i in some:
        body = json.loads(json.dumps(mix[i].body))
        for holder in (body, *(p for p in [body.get("sampling_params")] if isinstance(p, dict))):
            holder.pop("custom_params", None)
        plain.append(type(mix[i])(i, mix[i].path, body, mix[i].features, True))
    assert not report(plain, [expected[i] for i in some], answers(ar, plain))
