"""Requests that mix features at random, the same ones for every server.

A case is drawn in SGLang's native words (sampling parameters, and what stands beside them) and then written down in
the dialect of its endpoint. A stride is asked for by ``custom_params``, which plain AR serving ignores.
"""

import json
import random
from dataclasses import dataclass
from functools import cache

from tokenizers import Tokenizer

from tests.server.harness import CHECKPOINT, prompts
from tests.server.parity.processors import Ban

GENERATE, CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
STRIDES = (1, 2, 4, 8)
# Pieces of what the embedded checkpoint says, so that stops fall inside its runs.
LIKELY = (" is", "the ", "DLM", "5", "one", "st", " m", ". ", ",", " token", "er", "Hello", "\n", "1", " a", "e s")
LIKELY_WORDS = (" is", " the", "DLM", ".", ",", " a", " token", "1", "2", "0", " model", " of", " and", "\n")
SCHEMAS = (
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer"}}, "required": ["name", "n"]},
    {"type": "object", "properties": {"ok": {"type": "boolean"}, "tags": {"type": "array", "items": {"enum": ["a", "bb", "ccc"]}, "maxItems": 3}}, "required": ["ok", "tags"]},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 6},
)
REGEXES = ("[a-z ]{10,30}", "(yes|no), (one|two|three)( [0-9]{1,3}){1,4}\\.", "[A-Z][a-z]{2,9} is [a-z ]{5,20}\\.", "An I-DLM is [a-z ]{4,40}\\.")
EBNFS = (
    'root ::= word (" " word){2,6}\nword ::= "river" | "stone" | "model" | "token" [0-9]',
    'root ::= "(" expr ")"\nexpr ::= [0-9] | expr [+*] [0-9]',
)
TOOLS = (
    {"name": "add", "description": "Add two numbers", "parameters": {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 999}, "b": {"enum": [1, 2, 3]}}, "required": ["a", "b"]}},
    {"name": "greet", "parameters": {"type": "object", "properties": {"who": {"type": "string", "maxLength": 6}}, "required": ["who"]}},
)
CALL_REGEX = r'<tool_call>\n\{"name": "add", "arguments": \{"a": [0-9]{1,3}, "b": [123]\}\}\n</tool_call>'
THOUGHT_REGEX = "<think>[a-z ]{5,20}</think>[a-z ]{5,20}"


@dataclass(frozen=True)
class Case:
    """One request. ``features`` are keys of the parity table; ``exact`` says that its tokens are determined."""

    number: int
    path: str
    body: dict
    features: frozenset[str]
    exact: bool

    @property
    def streamed(self) -> bool:
        return isinstance(self.body, dict) and bool(self.body.get("stream"))


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(CHECKPOINT + "/tokenizer.json")


def token(word: str) -> int:
    return tokenizer().encode(word).ids[0]


class Ask:
    """A request in the making: native sampling parameters, and everything that is not one of them."""

    def __init__(self, rng: random.Random, path: str):
        self.rng, self.path = rng, path
        self.params = {"temperature": 0, "max_new_tokens": rng.randrange(1, 44)}
        self.top, self.features, self.streamed = {}, {"endpoints"}, rng.random() < 0.35

    def custom(self, **params):
        self.params.setdefault("custom_params", {}).update(params)

    def length(self, *choices):
        self.params["max_new_tokens"] = max(self.rng.choice(choices), self.params.get("min_new_tokens", 0))

    def words(self, count):
        return [self.rng.choice(LIKELY) for _ in range(count)]


# One function per feature: draws its parameters, or answers False where it cannot join those drawn before it.


def sampling(ask):
    rng = ask.rng
    ask.params |= rng.choice(
        [
            {"temperature": 1.0},
            {"temperature": 0.7, "top_p": 0.8},
            {"temperature": 1.5, "top_k": 5, "min_p": 0.05},
            {"temperature": 1.2, "top_k": 20, "top_p": 0.9},
            {"temperature": 1.0, "min_p": 0.1},
        ]
    )


def seed(ask):
    sampling(ask)
    ask.params["sampling_seed"] = ask.rng.choice([ask.rng.randrange(1000), -1, 2**31, 2**62 + 1])


def penalties(ask):
    names = ["frequency_penalty", "presence_penalty", "repetition_penalty"]
    for name in ask.rng.sample([*names, "min_new_tokens"], ask.rng.choice([1, 1, 2, 4])):
        values = {"repetition_penalty": [0.8, 1.1, 1.4], "min_new_tokens": [2, 8, 25]}.get(name, [-0.4, 0.3, 0.9, 1.7])
        ask.params[name] = ask.rng.choice(values)
    if "min_new_tokens" in ask.params:
        ask.params["min_new_tokens"] = min(ask.params["min_new_tokens"], ask.params["max_new_tokens"])


def logit_bias(ask):
    ask.params["logit_bias"] = {str(token(w)): ask.rng.choice([-100.0, -4.0, 2.5, 6.0]) for w in ask.rng.sample(LIKELY_WORDS, ask.rng.randrange(1, 5))}


def logprobs(ask):
    ask.top |= {"return_logprob": True, "top_logprobs_num": ask.rng.choice([0, 1, 3, 5])}
    if ask.rng.random() < 0.5:
        ask.top["logprob_start_len"] = 0
    if ask.rng.random() < 0.3:
        ask.top |= {"token_ids_logprob": [token(w) for w in LIKELY_WORDS[:3]], "return_text_in_logprobs": True}


def grammar(ask):
    ask.length(12, 40, 60)
    kind = ask.rng.choice(["json_schema", "json_schema", "regex", "ebnf", "json_object", "structural_tag"])
    if kind == "json_schema":
        ask.params["json_schema"] = json.dumps(ask.rng.choice(SCHEMAS))
    elif kind == "json_object":
        ask.params["json_schema"] = '{"type": "object"}'
    elif kind == "structural_tag":
        elements = [{"type": "const_string", "value": "<f>"}, {"type": "json_schema", "json_schema": SCHEMAS[2]}, {"type": "const_string", "value": "</f>"}]
        ask.params["structural_tag"] = json.dumps({"type": "structural_tag", "format": {"type": "sequence", "elements": elements}})
    else:
        ask.params[kind] = ask.rng.choice(REGEXES if kind == "regex" else EBNFS)


def tools(ask):
    if "grammar" in ask.features:
        return False
    ask.length(20, 60)
    ask.top["tools"] = list(TOOLS[: ask.rng.randrange(1, 3)])
    ask.top["tool_choice"] = ask.rng.choice(["auto", "auto", "required", "named", "none"])
    # The embedded checkpoint was never shown a tool: a regex makes it call one on its own account.
    if ask.path == CHAT and ask.top["tool_choice"] == "auto":
        ask.params["regex"] = CALL_REGEX
        ask.length(60)


def reasoning(ask):
    if ask.features & {"grammar", "tools"}:
        return False
    ask.params["regex"] = THOUGHT_REGEX
    ask.length(60)
    ask.top |= {"separate_reasoning": ask.rng.random() < 0.8, "stream_reasoning": ask.rng.random() < 0.5}


def stops(ask):
    rng = ask.rng
    for kind in rng.sample(["stop", "ids", "regex", "eos", "trim", "special"], rng.randrange(1, 4)):
        if kind == "stop":
            words = ask.words(rng.randrange(1, 4))
            ask.params["stop"] = words[0] if len(words) == 1 else words
        elif kind == "ids":
            ask.params["stop_token_ids"] = [token(w) for w in rng.sample(LIKELY_WORDS, rng.randrange(1, 4))]
        elif kind == "regex":
            ask.params["stop_regex"] = rng.choice(["[0-9] ", "[a-z]+\\.", "e[a-z] "])
        elif kind == "eos":
            # Behind the end of a grammar AR would go on with one token that no grammar allows.
            ask.params["ignore_eos"] = not ask.features & {"grammar", "tools", "reasoning"}
        elif kind == "trim":
            ask.params["no_stop_trim"] = True
        else:
            ask.params["skip_special_tokens"] = False


def batches(ask):
    ask.top["list"] = ask.rng.random() < 0.5 and ask.path in (GENERATE, COMPLETIONS)
    ask.top["ids"] = ask.rng.random() < 0.5 and ask.path in (GENERATE, COMPLETIONS)
    if ask.rng.random() < 0.5:
        ask.params["n"] = ask.rng.choice([2, 3])
    if ask.path == COMPLETIONS:
        ask.top |= ask.rng.choice([{}, {"best_of": 3}, {"suffix": "the end"}, {"user": "u"}])


def custom_processors(ask):
    ask.top["custom_logit_processor"] = Ban.to_str()
    ask.custom(ban=[token(w) for w in ask.rng.sample(LIKELY_WORDS, 3)])


def meta(ask):
    ask.top["meta"] = True


FEATURES = {
    f.__name__: (f, weight)
    for f, weight in (
        (sampling, 0.08),
        (seed, 0.25),
        (penalties, 0.22),
        (grammar, 0.16),
        (tools, 0.25),
        (reasoning, 0.25),
        (logit_bias, 0.2),
        (logprobs, 0.3),
        (stops, 0.3),
        (batches, 0.25),
        (custom_processors, 0.12),
        (meta, 0.3),
    )
}
# Features that an endpoint has no field for.
LACKING = {
    GENERATE: {"tools", "reasoning"},
    CHAT: set(),
    COMPLETIONS: {"tools", "reasoning"},
    RESPONSES: {"seed", "logit_bias", "batches", "custom_processors", "reasoning", "meta"},
    MESSAGES: {"seed", "logit_bias", "batches", "custom_processors", "reasoning", "meta", "penalties", "logprobs"},
}
ENDPOINTS = {GENERATE: 0.36, CHAT: 0.28, COMPLETIONS: 0.22, RESPONSES: 0.07, MESSAGES: 0.07}


def content(prompt: str) -> str:
    """The user's words of a single-turn prompt."""
    return prompt.removeprefix("<|im_start|>user\n").split("<|im_end|>")[0]


def messages(ask, text):
    if ask.rng.random() < 0.2:
        head = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]
        return [*head, {"role": "user", "content": text}]
    return [{"role": "user", "content": text}]


def generate_body(ask, texts) -> dict:
    top = {k: v for k, v in ask.top.items() if k in ("return_logprob", "top_logprobs_num", "logprob_start_len", "token_ids_logprob", "return_text_in_logprobs", "custom_logit_processor")}
    if "meta" in ask.top:
        top["return_prompt_token_ids"] = True
    single = not ask.top.get("list")
    whole = [tokenizer().encode(t).ids for t in texts] if ask.top.get("ids") else texts
    key = "input_ids" if ask.top.get("ids") else "text"
    params = ask.params if single or ask.rng.random() < 0.5 else [ask.params, {**ask.params, "max_new_tokens": 7}, *[ask.params] * (len(texts) - 2)]
    if isinstance(params, list):
        params = params[: len(texts)]
    if not single and "token_ids_logprob" in top:
        top["token_ids_logprob"] = [top["token_ids_logprob"]] * len(texts)
    return {key: whole[0] if single else whole, "sampling_params": params, **top}


RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}


def openai_body(ask) -> dict:
    """What chat and completions have in common."""
    body = {"model": CHECKPOINT} | {RENAMED.get(k, k): v for k, v in ask.params.items() if k not in ("json_schema", "structural_tag")}
    schema, tag = ask.params.get("json_schema"), ask.params.get("structural_tag")
    if schema == '{"type": "object"}':
        body["response_format"] = {"type": "json_object"}
    elif schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "s", "schema": json.loads(schema)}}
    elif tag is not None:
        body["response_format"] = json.loads(tag)
    if "custom_logit_processor" in ask.top:
        body["custom_logit_processor"] = ask.top["custom_logit_processor"]
    return body


def completions_body(ask, texts) -> dict:
    body = openai_body(ask) | {k: ask.top[k] for k in ("best_of", "suffix", "user") if k in ask.top}
    whole = [tokenizer().encode(t).ids for t in texts] if ask.top.get("ids") else texts
    body["prompt"] = whole if ask.top.get("list") else whole[0]
    if ask.top.get("return_logprob"):
        body |= {"logprobs": ask.top["top_logprobs_num"], "echo": ask.top.get("logprob_start_len") == 0}
    elif ask.rng.random() < 0.2:
        body["echo"] = True
    if "meta" in ask.top:
        body["return_token_ids"] = True
    return body


def tool_list(ask):
    return [{"type": "function", "function": t} for t in ask.top["tools"]]


def chat_body(ask, texts) -> dict:
    body = openai_body(ask) | {"messages": messages(ask, content(texts[0]))}
    # The chat template has no thinking mode; the parser takes it for on unless told.
    if ask.rng.random() < 0.85 or "tools" in ask.top or "regex" in body:
        body["chat_template_kwargs"] = {"enable_thinking": False}
    if ask.rng.random() < 0.3:
        body["max_completion_tokens"] = body.pop("max_tokens")
    if ask.top.get("return_logprob"):
        body |= {"logprobs": True, "top_logprobs": ask.top["top_logprobs_num"]}
    if "tools" in ask.top:
        choice = ask.top["tool_choice"]
        named = {"type": "function", "function": {"name": ask.top["tools"][-1]["name"]}}
        body |= {"tools": tool_list(ask), "tool_choice": named if choice == "named" else choice}
    body |= {k: ask.top[k] for k in ("separate_reasoning", "stream_reasoning") if k in ask.top}
    if "meta" in ask.top:
        # Chat refuses these in a stream.
        body |= {} if ask.streamed else {"return_token_ids": True, "return_prompt_token_ids": True, "return_meta_info": True}
    return body


def responses_body(ask, texts) -> dict:
    params = {k: v for k, v in ask.params.items() if k in ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")}
    if isinstance(ask.params.get("stop"), str):
        params["stop"] = ask.params["stop"]
    text = content(texts[0])
    body = {"model": CHECKPOINT, "input": messages(ask, text) if ask.rng.random() < 0.5 else text, "max_output_tokens": ask.params["max_new_tokens"] + 2, **params}
    body["chat_template_kwargs"] = {"enable_thinking": False}
    if "json_schema" in ask.params:
        body["text"] = {"format": {"type": "json_schema", "name": "s", "schema": json.loads(ask.params["json_schema"])}}
    elif "tools" in ask.top:
        choice = ask.top["tool_choice"]
        named = {"type": "function", "name": ask.top["tools"][-1]["name"]}
        body |= {"tools": [{"type": "function", **t} for t in ask.top["tools"]], "tool_choice": named if choice == "named" else choice}
    if ask.top.get("return_logprob") and not ask.streamed:
        body |= {"include": ["message.output_text.logprobs"], "top_logprobs": ask.top["top_logprobs_num"]}
    if ask.rng.random() < 0.3:
        body["instructions"] = "Answer shortly."
    return body


def messages_body(ask, texts) -> dict:
    params = {k: v for k, v in ask.params.items() if k in ("temperature", "top_p", "top_k")}
    body = {"model": CHECKPOINT, "messages": messages(ask, content(texts[0])), "max_tokens": ask.params["max_new_tokens"], **params}
    if "stop" in ask.params:
        stop = ask.params["stop"]
        body["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    if "json_schema" in ask.params:
        body["output_config"] = {"format": {"type": "json_schema", "schema": json.loads(ask.params["json_schema"])}}
    elif "tools" in ask.top:
        named = {"type": "tool", "name": ask.top["tools"][-1]["name"]}
        choice = {"required": {"type": "any"}, "named": named}.get(ask.top["tool_choice"], {"type": ask.top["tool_choice"]})
        body |= {"tools": [{"name": t["name"], "input_schema": t["parameters"]} for t in ask.top["tools"]], "tool_choice": choice}
    if ask.rng.random() < 0.3:
        body["system"] = "Answer shortly."
    body["thinking"] = {"type": "disabled"}
    return body


WRITERS = {GENERATE: generate_body, CHAT: chat_body, COMPLETIONS: completions_body, RESPONSES: responses_body, MESSAGES: messages_body}


def streaming(ask, body):
    if ask.streamed:
        body["stream"] = True
        if ask.path in (CHAT, COMPLETIONS) and ask.rng.random() < 0.7:
            body["stream_options"] = {"include_usage": True}


def draw(number: int, seed: int) -> Case:
    rng = random.Random(f"{seed}/{number}")
    ask = Ask(rng, rng.choices(list(ENDPOINTS), ENDPOINTS.values())[0])
    for name, (feature, weight) in FEATURES.items():
        if rng.random() < weight and name not in LACKING[ask.path]:
            if feature(ask) is not False:
                ask.features.add(name)
    stride = rng.choice([None, *STRIDES])
    if stride is not None and ask.path in (GENERATE, CHAT, COMPLETIONS):
        ask.custom(idlm_stride=stride)
    texts = prompts(rng.randrange(2, 4), seed=rng.randrange(10**6))
    body = WRITERS[ask.path](ask, texts)
    streaming(ask, body)
    exact = ask.params["temperature"] == 0 or ("sampling_seed" in ask.params)
    return Case(number, ask.path, body, frozenset(ask.features), exact)


def cases(count: int, seed: int) -> list[Case]:
    """``count`` cases, always the same for one ``seed``."""
    return [draw(number, seed) for number in range(count)]
