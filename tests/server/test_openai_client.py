"""The real ``openai`` client against the server that ``idlm serve`` starts."""

import pytest
from openai import AuthenticationError, BadRequestError, OpenAI


@pytest.fixture(scope="module")
def client(idlm_serve):
    return OpenAI(base_url=idlm_serve.url + "/v1", api_key=idlm_serve.KEY)


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


def test_chat_with_usage(client, model):
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "What is I-DLM?"}], temperature=0, max_tokens=120)
    text = answer.choices[0].message.content
    print(text)
    assert "language model" in text and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 5 and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streaming_gives_the_same_text_and_usage(client, model):
    ask = {"model": model, "messages": [{"role": "user", "content": "What is I-DLM?"}], "temperature": 0, "max_tokens": 120}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len([c for c in chunks if c.choices]) < whole.usage.completion_tokens, "several tokens per chunk were expected"


def test_completion(client, model):
    answer = client.completions.create(model=model, prompt="river stone", max_tokens=8, temperature=0)
    assert answer.choices[0].text and answer.usage.completion_tokens <= 8


def test_a_seed_is_honoured_without_a_server_flag(client, model):
    ask = {"model": model, "messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 1.0, "max_tokens": 60}
    texts = [client.chat.completions.create(**ask, seed=s).choices[0].message.content for s in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]
    for beyond_int64 in (2**63, 2**70):
        with pytest.raises(BadRequestError, match="seed"):
            client.chat.completions.create(**ask, seed=beyond_int64)


def test_an_impossible_stride_is_a_bad_request_in_openai_shape(client, model):
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=4, extra_body={"custom_params": {"idlm_stride": 99}}
        )
    assert "idlm_stride" in str(refused.value)


def test_another_key_is_refused(idlm_serve, model):
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=idlm_serve.url + "/v1", api_key="none").completions.create(model=model, prompt="river", max_tokens=1)
