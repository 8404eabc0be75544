"""The published dimensions, served: I-DLM-8B and R-ISD on Qwen3-8B with a rank of 128, one layer (SOAK_LAYERS) and random weights
(`tests/published.py`). One server at a time.
"""

import json
import random
import re
import shutil

import psutil
import pytest

from tests import published
from tests.server.harness import ids
from tests.soak.served import Served, number

LAYERS = number("SOAK_LAYERS", 1)
FREE = {"float32": 10 + LAYERS, "bfloat16": 7}  # GiB; in fp32 a scheduler has 7.1 resident with one layer, 0.8 more with each further one
MOST_BYTES = 24 * 2**30  # of data, most of it reserved and never touched
TOKENS, CLIENTS = 12, 8
VOCAB, NAMED, MASK = published.CONFIG["vocab_size"], max(published.MASK_TOKEN) + 1, published.CONFIG["mask_token_id"]
FLAGS = ["--max-total-tokens", "4096", "--max-running-requests", str(CLIENTS), "--disable-radix-cache"]
AR = ["--ar", "--disable-overlap-schedule"]  # with overlap SGLang counts tokens for penalties one step late
SCHEMA = json.dumps({"type": "object", "properties": {"a": {"enum": ["one", "two"]}, "n": {"type": "integer"}}, "required": ["a", "n"]})
GATED = ["--stride", "4", "--max-stride", "8", "--mask-token-id", str(MASK)]  # Qwen3-8B and the adapter name no MASK
GREEDY = {"temperature": 0}
TERMS = [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 50, "top_p": 0.95}, {"temperature": 1.5, "min_p": 0.05}, {"temperature": 1.0, "top_p": 0.9}]
PENALTIES = [{"presence_penalty": 1.5}, {"frequency_penalty": 0.8}, {"repetition_penalty": 1.3}]


def calls() -> list[dict]:
    """Greedy and seeded requests of token ids from the whole vocabulary, by the features that look at all of it."""
    rng = random.Random(0)

    def one(**params) -> dict:
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40))]
        return {"prompt": prompt, "max_new_tokens": TOKENS, "ignore_eos": True, **params}

    found = [one(**GREEDY) for _ in range(5)] + [one(**GREEDY, **penalty) for penalty in PENALTIES]
    found += [one(sampling_seed=i, **TERMS[i % len(TERMS)]) for i in range(8)] + [one(sampling_seed=20, **TERMS[1], **PENALTIES[1])]
    found += [one(**GREEDY, json_schema=SCHEMA), one(sampling_seed=21, **TERMS[0], json_schema=SCHEMA), one(sampling_seed=22, **TERMS[1], regex="(ab|cd){3,9}")]
    # An id of the embedding that the tokenizer has no name for, and the end of the vocabulary.
    found += [one(**GREEDY, logit_bias={str(NAMED + 3): 60.0}), one(sampling_seed=23, **TERMS[0], logit_bias={str(VOCAB - 1): 9.0})]
    return found + [one(**terms, return_logprob=True, top_logprobs_num=3) for terms in (GREEDY, {"sampling_seed": 24, **TERMS[1]})]


def strided(stride: int | None) -> list[dict]:
    return [{**call, "stride": stride} for call in calls()]


def same(want: list[dict], got: list[dict], what: str) -> None:
    """All answers equal: tokens, text, end, and log-probabilities up to rounding."""
    wrong = []
    for i, (left, right) in enumerate(zip(want, got, strict=True)):
        equal = ids(left) == ids(right) and left["text"] == right["text"] and left["meta_info"]["finish_reason"] == right["meta_info"]["finish_reason"]
        for name in ("output_token_logprobs", "output_top_logprobs"):
            rows = [json.loads(json.dumps(a["meta_info"].get(name) or [])) for a in (left, right)]
            flat = [[value for row in r for one in (row if isinstance(row[0], list) else [row]) for value in one[:2]] for r in rows]
            equal = equal and flat[0] == pytest.approx(flat[1], abs=1e-3)
        wrong += [] if equal else [i]
    rounds = sum(a["meta_info"].get("spec_verify_ct", 0) for a in got)
    drafts = [sum(a["meta_info"].get(name, 0) for a in got) for name in ("spec_num_correct_drafts", "spec_num_proposed_drafts")]
    print(f"{what}: {len(got) - len(wrong)} of {len(got)} answers equal AR's; {rounds} rounds, {drafts[0]} of {drafts[1]} drafts accepted", flush=True)
    assert not wrong, [(i, calls()[i], ids(want[i]), ids(got[i])) for i in wrong]


def served(name: str, logs, model, *flags: str, dtype: str = "float32") -> Served:
    return Served(name, logs, "--dtype", dtype, *FLAGS, *flags, model=str(model), most_bytes=MOST_BYTES)


def megabytes(server: Served) -> int:
    return server.processes()["scheduler"].memory_info().rss >> 20


def said(server: Served) -> str:
    """The line that says what memory goes into state."""
    return next(line for line in server.server_log.read_text().splitlines() if "memory for q" in line)


@pytest.fixture(params=["float32"])
def room(tmp_path, request):
    """A directory for the files, if there is memory to serve them in this dtype."""
    available = psutil.virtual_memory().available / 2**30
    if available < FREE[request.param]:
        pytest.skip(f"{available:.1f} GiB of memory available, {FREE[request.param]} needed")
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_an_idlm_of_the_published_dimensions_answers_as_its_ar(room, soak_logs):
    model = published.write_idlm(room / "I-DLM-8B", LAYERS)
    with served("published_ar", soak_logs, model, *AR) as server:
        want = server.many(calls(), CLIENTS)
        ar = megabytes(server)
    with served("published_isd", soak_logs, model, "--stride", "auto") as server:
        for stride in (1, 4, 8, None):
            got = server.many(strided(stride), CLIENTS)
            same(want, got, f"stride {stride or 'auto'}")
            assert not any(MASK in ids(a) for a in got)
        text = server.server_log.read_text()
        assert "type=IDLMForCausalLM" in text and f"MASK token {MASK} (from the config)" in text and "A genuine block-diffusion SDAR" in text
        assert published.TRAP[18:40] not in text
        counts = (CLIENTS + 1) * VOCAB * 4 / 2**20
        assert f"memory for q 0.0 MB, for token counts {counts:.1f} MB, {CLIENTS + 1} slots" in said(server)
        for tokens in ([VOCAB], [-1], [VOCAB - 1, 2**31]):
            refused = server.post("/generate", {"input_ids": tokens, "sampling_params": {"max_new_tokens": 2}})
            assert refused.status_code == 400 and "\n" not in refused.json()["error"]["message"], refused.text
        isd = megabytes(server)
    with served("published_rejection", soak_logs, model, "--stride", "4", "--sampling-rule", "rejection") as server:
        same(want, server.many(calls(), CLIENTS), "rejection rule, what greedy decoding or a seed decides,")
        q = (CLIENTS + 1) * 3 * VOCAB * 4 / 2**20
        assert f"memory for q {q:.1f} MB, for token counts {counts:.1f} MB" in said(server)
        loose = [{k: v for k, v in call.items() if k != "sampling_seed"} for call in calls() if "sampling_seed" in call]
        answers = server.many(loose, CLIENTS)
        assert all(1 <= len(ids(a)) <= TOKENS and MASK not in ids(a) for a in answers)
        assert sum(a["meta_info"]["spec_num_correct_drafts"] for a in answers)
        print(f"resident MiB of the scheduler: AR {ar}, stride auto {isd}, rejection at stride 4 {megabytes(server)}; {said(server).split('idlm: ')[1]}")


def test_risd_at_the_published_dimensions_answers_as_its_base(room, soak_logs):
    base, adapter = published.write_risd(room, LAYERS)
    with served("published_base", soak_logs, base, *AR) as server:
        want = server.many(calls(), CLIENTS)
    with served("published_risd", soak_logs, base, *GATED, "--idlm-lora", str(adapter)) as server:
        for stride in (1, 4, 8):
            same(want, server.many(strided(stride), CLIENTS), f"R-ISD, stride {stride}")
        text = server.server_log.read_text()
        found = re.search(r"rank (\d+), scaling ([\d.]+), .*; ([\d.]+) MB here", text)
        print(found[0])
        assert found[1] == str(published.RANK) and "IDLM_MASK_TOKEN_ID" in text


@pytest.mark.parametrize("room", ["bfloat16"], indirect=True)
def test_risd_in_bf16_parts_from_its_base_at_near_ties_alone(room, soak_logs):
    """Where a greedy answer differs, the base's own log-probabilities of the two tokens are at most half a unit apart."""
    base, adapter = published.write_risd(room, LAYERS)
    rng = random.Random(1)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40))] for _ in range(60)]
    asked = [{"prompt": p, "max_new_tokens": 2 * TOKENS, "ignore_eos": True, **GREEDY} for p in prompts]
    with served("published_risd_bf16", soak_logs, base, *GATED, "--idlm-lora", str(adapter), dtype="bfloat16") as server:
        got = [ids(a) for a in server.many(asked, CLIENTS)]
        single = [ids(a) for a in server.many([{**call, "stride": 1} for call in asked], CLIENTS)]
    with served("published_base_bf16", soak_logs, base, *AR, dtype="bfloat16") as server:
        want, alone = ([ids(a) for a in server.many(asked, clients)] for clients in (CLIENTS, 1))
        apart = []
        for prompt, left, right in zip(prompts, want, got):
            if left != right:
                at = next(i for i, (a, b) in enumerate(zip(left, right)) if a != b)
                row = server.generate(prompt + left[:at], max_new_tokens=1, return_logprob=True, top_logprobs_num=20, **GREEDY)["meta_info"]["output_top_logprobs"][0]
                found = {token: logprob for logprob, token, *_ in row}
                apart.append(abs(found.get(left[at], -99.0) - found.get(right[at], -99.0)))

    def differ(left, right) -> int:
        return sum(a != b for a, b in zip(left, right, strict=True))

    print(f"bf16, {len(prompts)} greedy prompts, answers that differ: base AR from R-ISD {differ(want, got)}, from R-ISD at one token per step "
          f"{differ(want, single)}, from base AR one at a time {differ(want, alone)}; log-probabilities apart by {sorted(apart)}")  # fmt: skip
    assert max(apart, default=0.0) < 0.5
