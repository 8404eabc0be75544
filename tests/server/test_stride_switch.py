"""The stride can be switched while requests run, and a request can choose its own."""

import random
import threading

import pytest

from tests.server.harness import chat, differing, ids, prompts


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


def test_a_server_that_chooses_its_stride_answers_as_ar(ar, isd_tight):
    calls = [{"prompt": p, "temperature": 0, "max_new_tokens": 40} for p in prompts(60, seed=103)]
    calls += [{"prompt": p, "temperature": 1.0, "sampling_seed": i, "max_new_tokens": 32} for i, p in enumerate(prompts(30, seed=104))]
    switch(isd_tight, 1)
    isd_tight.generate(chat("Hi"), temperature=0, max_new_tokens=8)
    before = strides(isd_tight)
    switch(isd_tight, 0)  # from here on it chooses, and these answers are not best made token by token
    for clients in (1, 12):
        assert not differing(ar.many(calls, clients), isd_tight.many(calls, clients))
    used = {n for n, count in strides(isd_tight).items() if count > before.get(n, 0)}
    state = isd_tight.info()["internal_states"][0]["idlm"]
    print(f"strides used: {sorted(used, key=int)}; {state['controller']}")
    assert used - {"1"}, "the controller never changed the stride"
    assert state["auto"] and state["controller"]["expected_gain"] > 0 and state["controller"]["actual_gain"] > 0


def strides(server):
    return server.info()["internal_states"][0]["idlm"]["steps_by_stride"]


def test_a_stride_can_be_forced_and_left_to_the_server_again(isd, isd_tight):
    assert switch(isd_tight, 3) == [True]
    try:
        before = strides(isd_tight)
        isd_tight.generate(chat("Hi"), temperature=0, max_new_tokens=200, ignore_eos=True)
        assert {n for n, count in strides(isd_tight).items() if count > before.get(n, 0)} == {"3"}
    finally:
        assert switch(isd_tight, 0) == [True]
    assert isd_tight.info()["internal_states"][0]["idlm"]["auto"]
    # Step times are measured at the start of a server that is to choose.
    assert switch(isd, 0) == [False]


@pytest.mark.parametrize("stride", [1, 8])
def test_a_request_may_fill_the_whole_kv_pool_as_in_ar(ar, isd_tight, stride):
    """1194 of 1200 columns; at stride 8 the last steps are narrower."""
    params = {"temperature": 0, "max_new_tokens": 94, "ignore_eos": True}
    body = {"input_ids": [500 + i % 97 for i in range(1100)], "sampling_params": params}
    switch(isd_tight, stride)
    try:
        answer = isd_tight.post("/generate", body).json()
    finally:
        switch(isd_tight, 0)
    assert ids(answer) == ids(ar.post("/generate", body).json()) and len(ids(answer)) == 94


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
