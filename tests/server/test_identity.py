"""Greedy ISD serving gives exactly the tokens of plain AR serving (fp32, same checkpoint, real servers)."""

import random

import pytest

from tests.server.harness import chat, differing, held_out_prompts, ids, prompts

PARAMS = {"temperature": 0, "max_new_tokens": 48}


def same(ar, other, calls, clients, **extra):
    """Both servers answer ``calls``; the other one with ``extra`` per call."""
    left = ar.many(calls, 16)
    right = other.many([{**call, **extra} for call in calls], clients)
    different = differing(left, right)
    assert not different, [(calls[i], left[i]["text"], right[i]["text"]) for i in different[:3]]
    return left, right


def per_forward(answers):
    tokens = sum(a["meta_info"]["completion_tokens"] - 1 for a in answers)
    return tokens / sum(a["meta_info"].get("spec_verify_ct", 0) for a in answers)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6, 8, 16])
def test_every_stride_gives_ar_tokens(ar, isd, stride):
    calls = [{"prompt": p, **PARAMS} for p in prompts(120, seed=stride)]
    _, right = same(ar, isd, calls, 16, stride=stride)
    print(f"stride {stride}: {len(calls)}/{len(calls)} identical, {per_forward(right):.2f} tokens per forward (finish trimming included)")
    if stride > 1:
        assert per_forward(right) > 1.2, "the run must be strided to mean anything"


@pytest.mark.parametrize("clients", [1, 8, 16])
def test_concurrency_does_not_change_tokens(ar, isd, clients):
    same(ar, isd, [{"prompt": p, **PARAMS} for p in prompts(40, seed=100 + clients)], clients)


def test_mixed_strides_in_one_batch(ar, isd):
    rng = random.Random(5)
    calls = [{"prompt": p, **PARAMS} for p in prompts(96, seed=7)]
    left = ar.many(calls, 16)
    right = isd.many([{**c, "stride": rng.choice([1, 2, 3, 4, 5, 8, 13, 16])} for c in calls], 16)
    assert not differing(left, right)


def test_shared_prefixes_and_reused_answers(ar, isd):
    """Radix reuse, of prompts and of text that a strided run wrote: KV of rejected drafts and MASK must not be in it."""
    rng = random.Random(3)
    context = prompts(6, seed=11)
    for turn in range(3):
        calls = [{"prompt": p, **PARAMS} for p in context for _ in range(2)]
        left, _ = same(ar, isd, calls, 12, stride=rng.choice([3, 4, 8]))
        context = [p + left[2 * i]["text"] + rng.choice(["\n", "<|im_end|>\n" + chat("And then?")]) for i, p in enumerate(context)]
    cached = [a["meta_info"]["cached_tokens"] for a in isd.many([{"prompt": p, **PARAMS} for p in context], 6)]
    assert sum(cached) > 100, "nothing was reused"


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_sync_paged_chunked_mixed(ar, isd_sync, stride):
    """Without overlap, pages of 16, decode steps in the forwards of prompt chunks of 32."""
    calls = [{"prompt": p, **PARAMS} for p in prompts(100, seed=20 + stride)]
    before = isd_sync.metrics()["idlm:mixed_steps_total"]
    same(ar, isd_sync, calls, 16, stride=stride)
    assert isd_sync.metrics()["idlm:mixed_steps_total"] > before + 20


@pytest.mark.parity("stops")
def test_stops_inside_an_accepted_run(ar, isd):
    """Stop ids, stop strings and max_tokens cut exactly where AR is cut, whatever the run offered."""
    plain = ar.many([{"prompt": p, **PARAMS} for p in prompts(30, seed=31)], 16)
    rng = random.Random(9)
    calls = []
    for p, answer in zip(prompts(30, seed=31), plain):
        tokens, text = ids(answer), answer["text"]
        calls.append({"prompt": p, **PARAMS, "stop_token_ids": [rng.choice(tokens)]})
        cut = rng.randrange(len(text)) if text else 0
        calls.append({"prompt": p, **PARAMS, "stop": [text[cut : cut + rng.randrange(1, 5)] or "\n"]})
        calls.append({"prompt": p, **PARAMS, "max_new_tokens": rng.randrange(1, 12)})
        calls.append({"prompt": p, **PARAMS, "ignore_eos": True, "max_new_tokens": rng.randrange(20, 60)})
        calls.append({"prompt": p, **PARAMS, "stop": [text[cut : cut + 2] or "a"], "no_stop_trim": True})
    for stride in (3, 8):
        same(ar, isd, calls, 16, stride=stride)


@pytest.mark.parity("stops")
def test_several_stops_inside_one_run(ar, isd):
    """The first in the text ends the answer: not the first in the list, and no stop string behind an end token."""
    texts = held_out_prompts(40, seed=32)
    rng = random.Random(10)
    calls = []
    for p, answer in zip(texts, ar.many([{"prompt": p, **PARAMS} for p in texts], 16)):
        tokens, text = ids(answer), answer["text"]
        if len(text) < 12:
            continue
        early = rng.randrange(len(text) - 8)
        near = early + rng.randrange(1, 6)
        calls.append({"prompt": p, **PARAMS, "stop": [text[near : near + 3], text[early : early + 2]]})
        calls.append({"prompt": p, **PARAMS, "stop": [text[near : near + 2]], "stop_token_ids": [rng.choice(tokens)]})
        calls.append({"prompt": p, **PARAMS, "stop_regex": "[a-z] [a-z]|[0-9]$", "stop": [text[near]]})
    assert len(calls) > 60
    for stride in (4, 8):
        same(ar, isd, calls, 16, stride=stride)


@pytest.mark.parity("batches")
def test_n_choices(ar, isd):
    body = {"text": chat("What is I-DLM?"), "sampling_params": {**PARAMS, "n": 3}}
    left, right = ar.post("/generate", body).json(), isd.post("/generate", body).json()
    assert len(right) == 3 and [a["text"] for a in left] == [a["text"] for a in right]


def test_streaming_gives_the_same_text(ar, isd):
    import json

    for prompt in prompts(6, seed=41):
        whole = ar.generate(prompt, **PARAMS)
        body = {"text": prompt, "sampling_params": PARAMS, "stream": True}
        last, steps = None, 0
        for line in isd.post("/generate", body, stream=True).iter_lines():
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                assert whole["text"].startswith(chunk["text"])
                last, steps = chunk, steps + 1
        assert last["text"] == whole["text"] and last["output_ids"] == ids(whole) and steps >= 1


def test_long_answer_to_the_end_of_the_context(ar, isd):
    """Rows behind the context's end must neither commit nor overrun tables."""
    prompt = " ".join(["river"] * 20)
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 4096}
    limit = {"max_new_tokens": 300}
    same(ar, isd, [{"prompt": prompt, **params, **limit}], 1, stride=16)
