"""Requests that are retracted at every fourth forward, or for a prompt's chunks. Stock SGLang gets some of the same where SOAK_STOCK=1.

``SOAK_WITHOUT=retract_beside_chunk`` leaves hooks of ``idlm_sglang/compat`` out: what is then counted is printed, and nothing is asked of it.
"""

import json
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from requests import RequestException

from tests.server.harness import prompts
from tests.server.parity.cases import tokenizer
from tests.server.test_embeds import RETRACTED, answered, check_unseeded, embedded
from tests.soak.served import Served, Stock, number

OFTEN = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "4"}
ARMS = ["isd", "ar", pytest.param("stock", marks=pytest.mark.skipif(not number("SOAK_STOCK", 0), reason="SOAK_STOCK=1: stock SGLang under the same requests"))]
SECONDS = 30
WITHOUT = os.environ.get("SOAK_WITHOUT", "")
REGEX = "[a-z]{3,8}( [a-z]{3,8}){8}"


def arm(name: str, logs, directory, *flags: str, env: dict | None = None) -> Served:
    if name == "stock":
        return Stock(logs, directory, *flags, env=env)
    if WITHOUT:
        env = {**(env or {}), "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent / "unmended"), os.environ.get("PYTHONPATH")]))}
    return Served(name, logs, *(["--ar"] if name == "ar" else ["--stride", "4"]), *flags, env=env)


@pytest.mark.parametrize("name", ARMS)
def test_streams_that_echo_their_prompt_keep_its_logprobs(name, soak_logs, tmp_path):
    def has_them(text: str) -> bool:
        body = {"model": "m", "prompt": text, "max_tokens": 24, "temperature": 0, "stream": True, "echo": True, "logprobs": 1}
        with server.post("/v1/completions", body, stream=True) as reply:
            events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith(b"data: {")]
        found = [p for event in events for choice in event["choices"] for p in (choice["logprobs"] or {}).get("token_logprobs", [])]
        return found[:1] == [None] and len(found) > len(tokenizer().encode(text).ids)

    texts = [f"{i} {text}" for i, text in enumerate(prompts(40, seed=54))]
    with arm(name, soak_logs, tmp_path, env=OFTEN) as server, ThreadPoolExecutor(6) as pool:
        lost = list(pool.map(has_them, texts)).count(False)
        retracted = len(RETRACTED.findall((server.server_log if name != "stock" else server.log).read_text(errors="replace")))
    print(f"{name} {WITHOUT}: {lost} of {len(texts)} streams lost the log-probabilities of their prompt; {retracted} times requests were retracted")
    assert retracted and (lost == 0 or name == "stock" or WITHOUT)


@pytest.mark.parametrize("name", ARMS)
def test_a_long_answer_beside_prompts_in_chunks_is_not_aborted(name, soak_logs, tmp_path):
    """One client of long answers, two of prompts, a pool that holds one of each."""
    flags = ["--max-total-tokens", "400", "--chunked-prefill-size", "16", "--schedule-conservativeness", "0.05", "--disable-overlap-schedule"]
    rng = random.Random(6)

    def asked(tokens: list[int], **params) -> int:
        body = {"input_ids": tokens, "sampling_params": {"temperature": 0, "logit_bias": {"2": -100}, **params}}
        try:
            return server.post("/generate", body).status_code
        except RequestException:
            return 0

    def short() -> None:
        while time.monotonic() < until:
            asked(rng.choices(range(300, 1000), k=rng.randrange(150, 270)), max_new_tokens=2)

    # Behind a retraction SGLang admits less for some steps: few of them.
    env = {"SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS": "5"}
    with arm(name, soak_logs, tmp_path, *flags, env=env) as server, ThreadPoolExecutor(2) as pool:
        until, answers = time.monotonic() + SECONDS, []
        clients = [pool.submit(short) for _ in range(2)]
        while time.monotonic() < until:
            answers.append(asked([5, 6, 7], max_new_tokens=290))
        for client in clients:
            client.result()
        again = server.server_log.read_text(errors="replace").count("is not aborted but retracted") if name != "stock" else 0
    aborted = sum(status != 200 for status in answers)
    print(f"{name} {WITHOUT}: {aborted} of {len(answers)} long answers aborted, {again} times one was retracted instead")
    assert answers and (aborted == 0 or name == "stock" or WITHOUT)


@pytest.mark.parametrize("name,flags", [("ar", []), ("isd", ["--sampling-rule", "rejection"])])
@pytest.mark.parametrize("grammars", ["xgrammar", "llguidance", "outlines"])
def test_unseeded_answers_to_embeddings_are_one_answer_each(name, flags, grammars, soak_logs, tmp_path):
    """Free ones, and ones that a grammar holds."""
    flags = [*flags, "--disable-radix-cache", "--incremental-streaming-output", "--grammar-backend", grammars]
    with arm(name, soak_logs, tmp_path, *flags, env=OFTEN) as server:
        server.log = server.server_log
        retracted = check_unseeded(server, server, 40)
        tokens = [tokenizer().encode(text).ids for text in prompts(40, seed=84)]
        bodies = [embedded(prompt, stream=i % 2 == 0, temperature=1.0, max_new_tokens=150, regex=REGEX) for i, prompt in enumerate(tokens)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda body: answered(server, body)[0], bodies))
        held = [tokenizer().decode(answer, skip_special_tokens=True).strip() for answer in answers if len(answer) < 150]
        wrong = [text for text in held if not re.fullmatch(REGEX, text)]
        print(f"{name} {grammars}: {len(wrong)} of {len(held)} answers that ended are not of the grammar; {retracted} times requests were retracted before")
        assert retracted and held and not wrong, wrong[:5]
