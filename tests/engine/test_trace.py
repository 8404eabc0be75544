"""The record of an answer's forwards, and of the seconds of a step's phases."""

import random

from idlm_sglang.engine.phases import PHASES, StepPhases
from idlm_sglang.engine.trace import Trace, collected


def test_a_trace_covers_every_token_whatever_brought_it():
    """Decode forwards at random places, prefills between them, told at random times."""
    rng = random.Random(3)
    for _ in range(200):
        trace, length, told, decoded = Trace(), 1, [], 0
        for _ in range(rng.randrange(12)):
            if rng.random() < 0.3:
                length += rng.randrange(1, 3)  # tokens of prefills: a retraction, a mixed batch
            tokens = rng.randrange(0, 5)
            trace.add(length, tokens, "verify", 4, tokens)
            length, decoded = length + tokens, decoded + 1
            if rng.random() < 0.5:
                told += trace.new(length)
        told += trace.new(length)
        assert sum(tokens for tokens, *_ in told) == trace.tokens == length
        assert told == trace.forwards and told[0] == [1, "prefill", 0, 0]
        assert sum(kind == "verify" for _, kind, *_ in told) == decoded
        assert trace.new(length) == []


def test_the_http_process_puts_the_pieces_together():
    class State:
        pass

    state = State()
    first = collected(state, [[1, "prefill", 0, 0]])
    assert collected(state, [[4, "verify", 3, 3]]) == [[1, "prefill", 0, 0], [4, "verify", 3, 3]]
    assert first == [[1, "prefill", 0, 0]], "what a client still reads does not grow"


def test_the_phases_of_a_step_add_up_to_it():
    clock = iter(range(1000))
    phases = StepPhases(now=lambda: next(clock))

    def step(batch):
        for _ in range(3):
            next(clock)  # work before the forward
        out = phases.forward(lambda x, times: [next(clock) for _ in range(times)] and x, batch, times=5)
        for _ in range(2):
            next(clock)
        return out

    assert phases.decode(step, "batch") == "batch"
    assert phases.seconds == {"prepare": 4, "forward": 6, "choose": 3, "process": 0, "prefill": 0}
    assert phases.whole("process", step, "b") == "b" and phases.seconds["process"] == 13
    assert tuple(phases.seconds) == PHASES and phases.seconds["forward"] == 6
    before = dict(phases.seconds)
    assert phases.decode(lambda: "came with a prefill") and phases.seconds == before and phases.steps == 1
