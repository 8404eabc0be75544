"""Endpoints that random cases do not reach: what they answer, AR answers."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.server.harness import CHECKPOINT
from tests.server.parity.cases import RESPONSES, TOOLS, Case
from tests.server.parity.compare import Answer, ask, differences

pytestmark = pytest.mark.parity("endpoints")
TALK = [{"role": "user", "content": "What is I-DLM?"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
CALLS = {
    "tokenize": ("/v1/tokenize", {"prompt": "river stone"}),
    "tokenize several": ("/tokenize", {"prompt": ["river stone", "I-DLM"], "add_special_tokens": False}),
    "tokenize a conversation": ("/v1/tokenize", {"messages": TALK}),
    "detokenize": ("/v1/detokenize", {"tokens": [310, 331, 342, 541, 2], "skip_special_tokens": False}),
    "score": ("/v1/score", {"query": "What is I-DLM?", "items": [" a", " the", " one two"], "label_token_ids": [310, 331, 5], "apply_softmax": True, "model": "m"}),
    "score, items first": ("/v1/score", {"query": [310, 331], "items": [[5, 6], [342]], "label_token_ids": [310, 331], "item_first": True, "model": "m"}),
    "score at a token": ("/v1/score", {"query": "1 river 2", "items": [" 3 stone 4"], "label_token_ids": [310, 5], "score_extraction_token": "1", "model": "m"}),
    "count tokens": ("/v1/messages/count_tokens", {"model": "m", "messages": TALK, "system": "Answer shortly."}),
    "parse a tool call": ("/parse_function_call", {"text": CALL, "tools": [{"type": "function", "function": TOOLS[0]}], "tool_call_parser": "qwen25"}),
    "separate reasoning": ("/separate_reasoning", {"text": "<think>a</think>b", "reasoning_parser": "qwen3"}),
    "vertex": ("/vertex_generate", {"instances": [{"text": "Hello"}], "parameters": {"sampling_params": {"temperature": 0, "max_new_tokens": 5}}}),
    "sagemaker": ("/invocations", {"model": "m", "messages": TALK, "temperature": 0, "max_tokens": 9}),
    "ollama chat": ("/api/chat", {"model": "m", "messages": TALK, "stream": False, "options": {"temperature": 0, "num_predict": 9}}),
    "ollama generate": ("/api/generate", {"model": "m", "prompt": "river", "stream": False, "options": {"temperature": 0, "num_predict": 9}}),
    "decisions": ("/v1/decisions", {"model": "m", "input": "I-DLM", "questions": [{"type": "yes_no", "id": "q", "question": "Is it a model?"}]}),
}  # fmt: skip
OLLAMA_TIMES = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


def without_times(answer):
    if isinstance(answer.tree, dict):
        answer.tree = {k: v for k, v in answer.tree.items() if k not in OLLAMA_TIMES}
    return answer


@pytest.mark.parametrize("name", CALLS)
def test_the_answer_is_that_of_ar(ar, isd, name):
    path, body = CALLS[name]
    case = Case(0, path, body, frozenset(), True)
    want, got = without_times(ask(ar, case)), without_times(ask(isd, case))
    print(want.status, str(want.tree)[:200])
    assert not differences(want, got)
    assert isd.alive()


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/" + CHECKPOINT, "/model_info", "/health", "/ping", "/ready", "/api/tags"])
def test_a_question_about_the_server_is_answered_as_by_ar(ar, isd, path):
    want, got = (requests.get(server.url + path, timeout=60) for server in (ar, isd))
    assert (want.status_code, want.headers.get("content-type")) == (got.status_code, got.headers.get("content-type"))
    if "json" in want.headers.get("content-type", ""):
        assert not differences(Answer(200, want.json()), Answer(200, got.json()), exact=False)


def test_stored_responses_are_retrieved_and_continued_as_by_ar(ar, isd):
    first = {"model": CHECKPOINT, "input": "My name is Osk.", "temperature": 0, "max_output_tokens": 30, "chat_template_kwargs": {"enable_thinking": False}}
    found = []
    for server in (ar, isd):
        answer = server.post(RESPONSES, first).json()
        again = requests.get(f"{server.url}{RESPONSES}/{answer['id']}", timeout=60)
        follow = {**first, "input": "What is my name?", "previous_response_id": answer["id"]}
        found.append(Answer(again.status_code, [answer, again.json(), server.post(RESPONSES, follow).json()]))
    for answer in found:
        answer.tree[2].pop("previous_response_id", None)
    assert not differences(*found)
    assert "Osk" in str(found[1].tree[2]["output"])


def test_embeddings_of_a_score_stay_at_their_tokens_beside_prompts_that_end(isd):
    """SGLang places them by the row of the prefill batch; MASK rows of the requests in front would move it."""
    embedding = [math.sin(i) for i in range(256)]

    def score(first):
        query = {"query": [first, 331, 342], "items": [[777, 541, 600]], "label_token_ids": [310, 331, 5], "apply_softmax": True, "model": "m"}
        return isd.post("/v1/score", {**query, "embed_override_token_id": 777, "item_embed_overrides": [[embedding]]}).json()["scores"][0]

    def generate(first):
        return isd.generate([first, *range(300, 308)], stride=16, temperature=0, max_new_tokens=4, ignore_eos=True)["output_ids"]

    asked = [(score if i % 4 == 3 else generate, 320 + i) for i in range(48)]
    found = []
    for clients in (16, 1):
        assert isd.post("/flush_cache", {}).status_code == 200
        with ThreadPoolExecutor(clients) as pool:
            found.append(list(pool.map(lambda call: call[0](call[1]), asked)))
    for together, alone in zip(*found, strict=True):
        assert together == pytest.approx(alone, abs=1e-4)
