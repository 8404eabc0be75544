"""The stride can be switched while requests run, and a request can choose its own."""

import random
import threading

import pytest

from tests.server.harness import chat, differing, prompts


def switch(server, value):
    return server.post("/set_internal_state", {"server_args": {"idlm_stride": value}}).json()


def test_switching_under_load_changes_no_token(ar, isd):
    calls = [{"prompt": p, "temperature": 0, "max_new_tokens": 64} for p in prompts(60, seed=101)]
    calls += [{"prompt": p, "temperature": 1.0, "sampling_seed": i, "max_new_tokens": 48} for i, p in enumerate(prompts(30, seed=102))]
    want = ar.many(calls, 16)
    stop, used = threading.Event(), []

    def flip():
        rng = random.Random(6)
        while not stop.is_set():
            used.append(rng.choice([1, 2, 3, 4, 6, 8, 16]))
            switch(isd, used[-1])
            stop.wait(0.15)

    flipping = threading.Thread(target=flip)
    flipping.start()
    try:
        got = isd.many(calls, 16)
    finally:
        stop.set()
        flipping.join()
        switch(isd, 4)
    assert not differing(want, got)
    assert len(set(used)) >= 4, "the stride hardly moved during the run"
    print(f"{len(calls)} answers identical over {len(used)} switches")


@pytest.mark.parametrize("value", [0, 17, -1, 2.5, "four"])
def test_an_impossible_stride_is_not_taken(isd, value):
    switch(isd, value)
    assert isd.info()["internal_states"][0]["idlm"]["stride"] == 4


def test_the_relaxed_acceptance_knobs_are_gone(isd):
    reply = isd.post("/set_internal_state", {"server_args": {"speculative_accept_threshold_single": 0.5}})
    assert "true" not in reply.text.lower()


@pytest.mark.parametrize("value", [0, 17, -3, "4", 2.5, True, [4]])
def test_a_request_with_an_impossible_stride_gets_a_400_that_names_it(isd, value):
    body = {"text": chat("Hi"), "sampling_params": {"max_new_tokens": 4, "custom_params": {"idlm_stride": value}}}
    reply = isd.post("/generate", body)
    assert reply.status_code == 400 and "idlm_stride" in reply.text and "1 to 16" in reply.text
