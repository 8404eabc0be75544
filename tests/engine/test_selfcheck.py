"""Which answers are checked, how often, and what a check makes of what it sees. The server is a stand-in."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from idlm_sglang.config import Settings
from idlm_sglang.engine import selfcheck
from idlm_sglang.engine.selfcheck import QUEUE, SelfCheck, first_difference

STOP = {"type": "stop", "matched": 2}


def request(**fields):
    given = {"rid": "r", "text": "a", "input_ids": None, "sampling_params": {"temperature": 1.0}, "log_metrics": True, "no_logs": False}
    given |= {"input_embeds": None, "session_params": None, "positional_embed_overrides": None, "lora_path": None, "media": False}
    given |= {"custom_logit_processor": None, "require_reasoning": False, "max_thinking_tokens": None}
    given |= fields
    return SimpleNamespace(**given, contains_mm_input=lambda: given["media"])


def meta(**fields):
    return {"id": "r", "finish_reason": STOP, "seed": 5, "weight_version": "default", "prompt_tokens": 3} | fields


class Manager:
    """Answers every check with ``reply(request)``; a client's request is in flight while ``clients`` is not empty."""

    def __init__(self, reply=None, dtype="torch.float32"):
        self.reply, self.asked, self.dispatched, self.clients = reply, [], [], {}
        self.rid_to_state = self.clients
        self.gracefully_exit = self.is_pause = False
        self.model_config = SimpleNamespace(dtype=dtype)
        self.model_update_lock = SimpleNamespace(_writer_active=False, _waiting_writers=0)

    async def generate_request(self, obj):
        self.asked.append(obj)
        self.now = asyncio.get_running_loop().create_future()
        answer = self.reply(obj)
        if answer is None:  # runs until it is aborted
            answer = await self.now
        yield answer

    def _dispatch_to_scheduler(self, abort):
        self.dispatched.append(abort.rid)
        if not self.now.done():
            self.now.set_result({"output_ids": [1], "meta_info": meta(finish_reason={"type": "abort"})})


def answer(tokens, **fields):
    return {"output_ids": tokens, "meta_info": meta(**fields)}


def checked(manager, offers, share=1.0, rule="coupled", act=None):
    """The events counted for ``offers`` of (request, tokens, meta), once the queue has run empty; ``act`` runs beside it."""
    events = []

    async def run():
        checker = SelfCheck(manager, Settings(selfcheck=share, sampling_rule=rule), events.append)
        for offer in offers:
            checker.offer(*offer)
        if act is not None:
            await act(checker)
        if checker._worker is not None:
            await asyncio.wait_for(checker._worker, 30)

    asyncio.run(run())
    return events


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(selfcheck, "_IDLE_SECONDS", 0.01)
    monkeypatch.setattr(selfcheck, "_POLL_SECONDS", 0.005)


def test_an_equal_repetition_counts_once_and_asks_the_same_at_one_token_per_step():
    manager = Manager(lambda obj: answer([7, 8, 2]))
    asked = {"temperature": 0.5, "n": 2, "max_new_tokens": 900, "stop": ["x"], "custom_params": {"mine": 1, "idlm_stride": 8}}
    assert checked(manager, [(request(sampling_params=asked), [7, 8, 2], meta())]) == ["total"]
    (obj,) = manager.asked
    assert obj.text == "a" and obj.rid.startswith("idlm-selfcheck-") and not obj.log_metrics and not obj.stream
    assert obj.extra_key, "no KV of the answer is taken over"
    assert obj.sampling_params == asked | {
        "n": 1,
        "max_new_tokens": 4,
        "sampling_seed": 5,
        "custom_params": {"mine": 1, "idlm_stride": 1, "idlm_selfcheck": True},
    }


@pytest.mark.parametrize(
    "again, where",
    [
        (answer([7, 9, 2]), "first at token 1: 8, at one token per step 9"),
        (answer([7, 8]), "first at token 2: 2, at one token per step the end"),
        (answer([7, 8, 2], finish_reason={"type": "length"}), "finish reason stop, at one token per step length"),
    ],
)
def test_a_different_repetition_is_a_mismatch_with_a_line_to_replay(caplog, again, where):
    assert checked(Manager(lambda obj: again), [(request(), [7, 8, 2], meta())]) == ["total", "mismatch"]
    (line,) = [r.message for r in caplog.records if "MISMATCH" in r.message]
    assert "rid r, seed 5" in line and where in line and "\n" not in line
    entry = json.loads(line.split("; replay: ")[1])
    assert entry["path"] == "/generate" and entry["request"]["text"] == "a" and entry["response"]["output_ids"] == [7, 8, 2]
    assert entry["response"]["meta_info"] == {"finish_reason": STOP, "seed": 5}


def test_a_request_that_must_not_be_logged_is_not(caplog):
    checked(Manager(lambda obj: answer([9])), [(request(no_logs=True), [7], meta())])
    (line,) = [r.message for r in caplog.records if "MISMATCH" in r.message]
    assert "rid r, seed 5" in line and "replay" not in line


@pytest.mark.parametrize(
    "obj, found, rule, drawn",
    [
        (request(), {}, "coupled", True),
        (request(sampling_params={"temperature": 0}), {"seed": None}, "coupled", True),
        (request(sampling_params=None), {"seed": None}, "coupled", True),
        (request(sampling_params={"temperature": 0}), {"seed": None}, "rejection", True),
        (request(), {}, "rejection", True),
        (request(), {"seed": None}, "rejection", False),
        (request(), {"finish_reason": {"type": "abort"}}, "coupled", False),
        (request(log_metrics=False), {}, "coupled", False),
        (request(input_embeds=[[0.0]]), {}, "coupled", False),
        (request(session_params={"id": "s"}), {}, "coupled", False),
        (request(positional_embed_overrides=object()), {}, "coupled", False),
        (request(media=True), {}, "coupled", False),
        (request(sampling_params={"custom_params": {"idlm_selfcheck": True}}), {}, "coupled", False),
    ],
)
def test_only_finished_answers_that_can_be_asked_again_are_drawn(obj, found, rule, drawn):
    facts = {k: v for k, v in (meta() | found).items() if v is not None}
    assert checked(Manager(lambda obj: answer([7])), [(obj, [7], facts)], rule=rule) == ["total"] * drawn


def test_the_share_of_the_answers_is_checked():
    offers = [(request(), [7], meta())] * 60
    assert checked(Manager(lambda obj: answer([7])), offers, share=1.0) == ["total"] * 60
    assert checked(Manager(lambda obj: answer([7])), offers, share=0.0) == []
    some = sum(len(checked(Manager(lambda obj: answer([7])), offers, share=0.25)) for _ in range(10))
    assert 75 < some < 230, "600 draws at 0.25; outside in fewer than one of a million runs"


def test_what_the_queue_cannot_hold_is_counted():
    events = checked(Manager(lambda obj: answer([7])), [(request(), [7], meta())] * (QUEUE + 3))
    assert events.count("dropped") == 3 and events.count("total") == QUEUE


def test_a_check_waits_for_clients_makes_room_for_them_and_comes_again():
    replies = iter([None, answer([7])])
    manager = Manager(lambda obj: next(replies))
    manager.clients["c"] = SimpleNamespace(obj=request())

    async def act(checker):
        await asyncio.sleep(0.1)
        assert not manager.asked, "a client's request is in flight"
        manager.is_pause = True
        manager.clients.clear()
        await asyncio.sleep(0.1)
        assert not manager.asked, "a paused server would keep the check waiting inside it"
        manager.is_pause = False
        while not manager.asked:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        assert not manager.dispatched
        checker.client_arrives(request(rid="c2"))
        assert manager.dispatched == [manager.asked[0].rid], "aborted before the client's request is sent"

    assert checked(manager, [(request(), [7], meta())], act=act) == ["total"]
    assert len(manager.asked) == 2


def test_an_abort_that_was_not_heard_is_repeated():
    replies = iter([None, answer([7])])
    manager = Manager(lambda obj: next(replies))

    async def act(checker):
        while not manager.asked:
            await asyncio.sleep(0.005)
        manager.clients["c"] = SimpleNamespace(obj=request())
        while not manager.dispatched:
            await asyncio.sleep(0.005)
        manager.clients.clear()

    assert checked(manager, [(request(), [7], meta())], act=act) == ["total"]


@pytest.mark.parametrize("changed", [{"weight_version": "next"}, {"prompt_tokens": 4}])
def test_another_model_or_another_prompt_decides_nothing(changed):
    assert checked(Manager(lambda obj: answer([9], **changed)), [(request(), [7], meta())]) == ["dropped"]


def test_other_weights_need_not_wait_and_end_the_checks_of_the_old_ones():
    manager = Manager(lambda obj: None)

    async def act(checker):
        while not manager.asked:
            await asyncio.sleep(0.005)
        manager.model_update_lock._waiting_writers = 1
        while not manager.dispatched:
            await asyncio.sleep(0.005)

    assert checked(manager, [(request(), [7], meta())] * 5, act=act) == ["dropped"] * 5
    assert len(manager.asked) == 1


def test_a_check_that_fails_ends_alone(caplog):
    replies = iter([ValueError("too long"), answer([7])])

    def reply(obj):
        if isinstance(found := next(replies), Exception):
            raise found
        return found

    assert sorted(checked(Manager(reply), [(request(), [7], meta())] * 2)) == ["dropped", "total"]


@pytest.mark.parametrize("dtype, apart, events", [
    ("torch.bfloat16", 0.01, ["total", "tie"]),
    ("torch.bfloat16", 2.0, ["total", "mismatch"]),
    ("torch.float32", 0.0, ["total", "mismatch"]),
])
def test_near_ties_are_forgiven_in_low_precision_only(dtype, apart, events):
    """Greedy: no noise. The second repetition brings the log-probabilities."""

    def reply(obj):
        found = answer([7, 9])
        if obj.return_logprob:
            found["meta_info"] |= {
                "output_token_ids_logprobs": [[], [[-1.0 - apart, 8, None], [-1.0, 9, None]]],
                "output_top_logprobs": [[], [[-1.0, 9, None], [-1.0 - apart, 8, None]]],
            }
        return found

    manager = Manager(reply, dtype)
    facts = {k: v for k, v in meta().items() if k != "seed"}
    assert checked(manager, [(request(sampling_params={"temperature": 0}), [7, 8], facts)]) == events
    if dtype == "torch.bfloat16":
        assert manager.asked[1].sampling_params["max_new_tokens"] == 2 and manager.asked[1].token_ids_logprob == [8, 9]


def test_first_difference():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], [1]) == 0
