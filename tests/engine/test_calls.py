"""A streamed answer's tool calls do not depend on the chunks that it comes in."""

import random
from functools import partial

import pytest
from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser

from idlm_sglang.compat.calls import parse_tag_by_tag, parse_to_the_end

TOOLS = [Tool(type="function", function={"name": name, "parameters": {"type": "object"}}) for name in ("add", "greet", "now")]
CALLS = ('{"name": "add", "arguments": {"a": 12, "b": 1.5}}', '{"name": "greet", "arguments": {"who": "Tavo <3 \\"é\\""}}', '{"name": "now", "arguments": {}}')
TEXTS = ("", "Sure, let me see.\n", "a < b, ")


class Hooked(FunctionCallParser):
    """As the server's parser is, once the hooks are applied."""

    def parse_stream_chunk(self, chunk_text):
        return parse_tag_by_tag(FunctionCallParser.parse_stream_chunk, self, chunk_text)

    def parse_stream_end(self):
        return parse_to_the_end(FunctionCallParser.parse_stream_end, self)


def parsed(kind, chunks) -> tuple[str, dict]:
    """Text and ``{index: [name, arguments]}`` as a client puts them together."""
    parser, text, calls = kind(TOOLS, "qwen25"), "", {}
    for step in [*(partial(parser.parse_stream_chunk, chunk) for chunk in chunks), parser.parse_stream_end]:
        more, found = step()
        text += more or ""
        for call in found:
            calls.setdefault(call.tool_index, ["", ""])
            calls[call.tool_index][0] += call.name or ""
            calls[call.tool_index][1] += call.parameters
    return text, calls


def cut(rng: random.Random, answer: str, longest: int) -> list[str]:
    chunks = []
    while answer:
        size = rng.randrange(1, longest + 1)
        chunks.append(answer[:size])
        answer = answer[size:]
    return chunks


@pytest.mark.parametrize("wrong", ['{"name": "add", "arguments": {"a": 1}\n</tool_call>', '{"name": "add", "arguments": {"a": 12, b'])
def test_of_a_call_that_is_no_json_what_was_understood_stays(wrong):
    """SGLang's chat endpoint sends the end of the arguments from there."""
    known = []
    for kind in (FunctionCallParser, Hooked):
        parser = kind(TOOLS, "qwen25")
        for letter in "<tool_call>\n" + wrong:
            parser.parse_stream_chunk(letter)
        parser.parse_stream_end()
        known.append(parser.detector.prev_tool_call_arr)
    assert known[0] == known[1] and known[0][0]["arguments"]["a"] in (1, 12)


@pytest.mark.parametrize("cut_off", [False, True])
def test_calls_and_text_are_those_of_the_answer_letter_by_letter(cut_off):
    rng, stock = random.Random(3), 0
    for _ in range(300):
        blocks = [f"<tool_call>\n{call}\n</tool_call>" for call in rng.sample(CALLS, rng.randrange(1, 4))]
        answer = rng.choice(TEXTS) + "\n".join(blocks)
        if cut_off:
            answer = answer[: rng.randrange(1, len(answer))]
        want = parsed(Hooked, answer)
        chunks = cut(rng, answer, rng.choice((4, 12, 40, 300)))
        assert parsed(Hooked, chunks) == want, chunks
        stock += parsed(FunctionCallParser, chunks) != want
        if not cut_off:
            assert want == parsed(FunctionCallParser, answer)
    print(f"SGLang's own parser: {stock} of 300 answers differ")
    assert stock > 30, "the hooks are not needed any more"
