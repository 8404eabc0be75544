"""What counts as an answer, and that nothing compared is no parity."""

from types import SimpleNamespace

import pytest

from idlm_sglang.parity import speed
from idlm_sglang.parity.answers import Pair, answered, fields, parting
from idlm_sglang.parity.compare import Answer, differences, join
from idlm_sglang.parity.endpoint import Reply, failed
from idlm_sglang.parity.prompts import GREEDY, Ask
from idlm_sglang.serving.replay import CHAT, COMPLETIONS, GENERATE

PLAN = SimpleNamespace(tie_margin=0.05, speed_rounds=2, min_speed_ratio=1.5)


def native(kind="stop"):
    return {"text": "a", "meta_info": {"finish_reason": {"type": kind}}}


def chat(text, tops=None):
    entries = [{"token": t, "top_logprobs": [{"token": k, "logprob": v} for k, v in top.items()]} for t, top in tops or []]
    return {"choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop", "logprobs": {"content": entries}}]}


@pytest.mark.parametrize(
    ("path", "tree"),
    [
        (GENERATE, {"chunks": [], "others": [{"error": {"message": "no"}}, "[DONE]"]}),
        (GENERATE, {"chunks": [native()], "others": [{"error": {"message": "late"}}, "[DONE]"]}),
        (GENERATE, [native(), native("abort")]),
        (CHAT, {"broken stream": "KeyError: 'choices'"}),
        (CHAT, {"choices": {0: {"delta": {"content": "a"}}}, "error": {"message": "late"}}),
        (COMPLETIONS, {"choices": [{"index": 0, "text": "a", "finish_reason": "abort"}]}),
        (COMPLETIONS, "no JSON"),
    ],
)
def test_an_error_behind_http_200_is_no_answer(path, tree):
    assert failed(path, Answer(200, tree))


@pytest.mark.parametrize(("path", "tree"), [(GENERATE, {"chunks": [native()], "others": ["[DONE]"]}), (GENERATE, [native(), native()]), (CHAT, chat("a"))])
def test_an_answer_is_one(path, tree):
    assert not failed(path, Answer(200, tree)) and failed(path, Answer(400, tree))


def test_requests_that_both_refuse_show_no_parity():
    error = {"chunks": [], "others": [{"error": {"message": "no"}}, "[DONE]"]}
    pair = Pair(Ask("line 1", GENERATE, {}, GREEDY), Reply(Answer(200, error)), Reply(Answer(200, error)))
    assert answered([pair], GREEDY) == []
    found = fields([pair], {GREEDY}, PLAN)
    assert found.passed is False and "no request was answered by both" in found.line


def test_a_speed_that_was_demanded_and_not_measured_is_not_reached():
    assert speed.compare([Ask("line 1", COMPLETIONS, {}, GREEDY)], None, None, PLAN).passed is False


class Asked:
    def __init__(self, tree):
        self.tree = tree

    def ask(self, ask, body):
        assert "stream" not in body
        return Reply(Answer(200, self.tree))


def test_a_tie_elsewhere_excuses_no_difference():
    """The answers part at "x", "y"; asked again they part later, at a near-tie."""
    tie = {"p": -0.7, "q": -0.71}
    left = Asked(chat("abp", [("ab", {"ab": 0.0, "z": -9.0}), ("p", tie)]))
    right = Asked(chat("abq", [("ab", {"ab": 0.0, "z": -9.0}), ("q", tie)]))
    ask = Ask("line 1", CHAT, {"messages": [], "stream": True}, GREEDY)
    assert parting(ask, ["abp"], ["abq"], left, right).margin == pytest.approx(0.01)
    assert parting(ask, ["ax"], ["ay"], left, right).margin is None


def test_a_token_that_is_no_candidate_is_no_near_tie():
    left = Asked(chat("p", [("p", {"p": -0.1, "r": -0.11})]))
    right = Asked(chat("q", [("q", {"q": -0.1, "r": -0.11})]))
    assert parting(Ask("line 1", CHAT, {"messages": []}, GREEDY), ["p"], ["q"], left, right).margin is None


def test_log_probabilities_of_tokens_without_text_are_no_difference_in_how_a_stream_is_cut():
    """SGLang sends none of a step that shows no text: by one token a step the end of an answer has none, in a run of two it has."""

    def streamed(*steps):
        chunks = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
        for text, tokens in steps:
            if text:
                entries = [{"token": token, "logprob": logprob} for token, logprob in tokens]
                chunks.append({"choices": [{"index": 0, "delta": {"content": text}, "logprobs": {"content": entries}}]})
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        return Answer(200, join(CHAT, [*chunks, "[DONE]"]))

    a, b, end = ("a", -0.1), (" b", -0.2), ("<|im_end|>", -0.3)
    single, run = streamed(("a", [a]), (" b", [b]), ("", [end])), streamed(("a", [a]), (" b", [b, end]))
    assert not differences(single, run)
    assert differences(single, streamed(("a", [a]), (" b", [(" b", -0.5), end])))
    assert differences(single, streamed(("a b", [a]), ("", [b, end])))
