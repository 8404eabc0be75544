"""Where several stops fall into one accepted run, the first one met counts, as if tokens came one at a time."""

import random

import pytest

from tests.server.harness import differing, ids, prompts
from tests.server.parity.cases import tokenizer

pytestmark = pytest.mark.parity("stops")
PARAMS = {"temperature": 0, "max_new_tokens": 40}


def pairs(plain, count, seed):
    """Two tokens at most three apart in AR's own answers, the first of them new there: ``(answer, first, second)``."""
    rng = random.Random(seed)
    found = []
    while len(found) < count:
        n = rng.randrange(len(plain))
        tokens = ids(plain[n])
        if len(tokens) < 8:
            continue
        first = rng.randrange(2, len(tokens) - 4)
        second = first + rng.randrange(1, 4)
        if tokens[first] not in tokens[:first] and tokens[second] not in tokens[: first + 1]:
            found.append((n, tokens[first], tokens[second]))
    return found


def word(token):
    return tokenizer().decode([token])


STOPS = {
    "two strings, the later one named first": lambda a, b: {"stop": [word(b), word(a)]},
    "a string behind a token id": lambda a, b: {"stop": [word(b)], "stop_token_ids": [a]},
    "a string behind a token id, untrimmed": lambda a, b: {"stop": [word(b)], "stop_token_ids": [a], "no_stop_trim": True},
    "a string before a token id": lambda a, b: {"stop": [word(a)], "stop_token_ids": [b]},
    "an expression behind a string": lambda a, b: {"stop_regex": [_escaped(b)], "stop": [word(a)]},
    "a string behind an expression": lambda a, b: {"stop_regex": [_escaped(a)], "stop": [word(b)]},
    "two expressions, the later one named first": lambda a, b: {"stop_regex": [_escaped(b), _escaped(a)]},
}


def _escaped(token):
    return "".join(c if c.isalnum() or c == " " else f"[{c}]" for c in word(token) if c not in "^\\[]\n") or "never"


@pytest.mark.parametrize("name", STOPS)
def test_the_first_of_two_stops_in_a_run_counts(ar, isd, name):
    texts = prompts(30, seed=301)
    plain = ar.many([{"prompt": p, **PARAMS} for p in texts], 16)
    calls = [{"prompt": texts[n], **PARAMS, **STOPS[name](a, b)} for n, a, b in pairs(plain, 40, seed=302)]
    want, got = ar.many(calls, 16), isd.many([{**c, "stride": 8} for c in calls], 16)
    different = differing(want, got)
    shown = [(calls[i], want[i]["text"], want[i]["meta_info"]["finish_reason"], got[i]["text"], got[i]["meta_info"]["finish_reason"]) for i in different[:2]]
    assert not different, f"{len(different)} of {len(calls)} differ: {shown}"


def test_nothing_behind_a_stop_is_in_usage_or_logprobs(ar, isd):
    """Stopped in the middle of a run: as many tokens, logprobs and counted tokens as AR, none of a token behind the stop."""
    texts = prompts(20, seed=303)
    plain = ar.many([{"prompt": p, **PARAMS} for p in texts], 16)
    calls = [{"prompt": texts[n], **PARAMS, "stop_token_ids": [a], "return_logprob": True} for n, a, _ in pairs(plain, 30, seed=304)]
    for want, got in zip(ar.many(calls, 16), isd.many([{**c, "stride": 8} for c in calls], 16)):
        meta = got["meta_info"]
        assert ids(got) == ids(want) and got["text"] == want["text"]
        assert len(ids(got)) == meta["completion_tokens"] == len(meta["output_token_logprobs"])
