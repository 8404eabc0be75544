"""The suite can fail: an engine that is broken on purpose differs from AR, and the same engine unbroken does not."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.server.conftest import SERVED
from tests.server.fleet import server_fixture
from tests.server.harness import CHECKPOINT, Server
from tests.server.parity.cases import CHAT, COMPLETIONS, GENERATE
from tests.server.parity.conftest import answers
from tests.server.parity.test_mix import report

# Break: the feature whose cases must show it.
BREAKS = {"bias": "logit_bias", "penalties": "penalties", "grammar": "grammar", "seed": "seed", "logprobs": "logprobs", "stops": "stops"}


@server_fixture
def breakable(logs):
    """An ISD server whose requests may ask to be served wrongly; hidden states are on, as far as SGLang is concerned."""
    mutants = str(Path(__file__).parent / "mutants")
    path = os.pathsep.join(filter(None, [mutants, os.environ.get("PYTHONPATH")]))
    flags = ["--speculative-algorithm", "ISD", "--enable-return-hidden-states", *SERVED]
    return Server("breakable", CHECKPOINT, logs, *flags, env={"PYTHONPATH": path, "IDLM_STRIDE": "8"})


def asking(case, name):
    """The case, with the wish to be served wrongly."""
    body = json.loads(json.dumps(case.body))
    holders = body.get("sampling_params", body) if case.path == GENERATE else body
    for holder in holders if isinstance(holders, list) else [holders]:
        holder["custom_params"] = {**(holder.get("custom_params") or {}), "break": name}
        # A stride of 1 verifies no drafts: there would be nothing to break.
        holder["custom_params"].pop("idlm_stride", None)
    return replace(case, body=body)


@pytest.fixture(scope="module")
def chosen(mix):
    """By break, the numbers of the cases that it should change."""
    found = {}
    for name, feature in BREAKS.items():
        able = [c for c in mix if feature in c.features and c.exact and c.path in (GENERATE, CHAT, COMPLETIONS) and "custom_processors" not in c.features]
        found[name] = [c.number for c in able][:40]
    return found


@pytest.mark.parity("seed")
def test_unbroken_nothing_differs_after_a_restart(breakable, mix, expected, chosen):
    """The breakable server is another process than the one that answered the mix: seeds, too, give what they gave there."""
    numbers = sorted({n for some in chosen.values() for n in some})
    some = [asking(mix[n], "") for n in numbers]
    assert not report(some, [expected[n] for n in numbers], answers(breakable, some))


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_engine_differs_from_ar(breakable, mix, expected, chosen, name):
    some = [asking(mix[n], name) for n in chosen[name]]
    found = report(some, [expected[n] for n in chosen[name]], answers(breakable, some))
    print(f"{name}: {len(found)} of {len(some)} cases differ" + ("".join(f"\n  {found[0]}") if found else ""))
    assert found, "the suite would not have noticed"
    assert breakable.alive()


@pytest.mark.parity("hidden_lora")
@pytest.mark.parametrize("path, body", [(GENERATE, {"text": "Hello", "sampling_params": {"max_new_tokens": 4}}), (CHAT, {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}), (COMPLETIONS, {"model": "m", "prompt": "Hello", "max_tokens": 4})])  # fmt: skip
def test_hidden_states_are_refused_by_name_where_the_server_would_return_them(breakable, path, body):
    reply = breakable.post(path, {**body, "return_hidden_states": True})
    assert reply.status_code == 400 and "return_hidden_states" in reply.text and "ISD" in reply.text, reply.text
    assert breakable.alive()
