"""Tool calls of a streamed answer, whatever chunks it comes in."""

import re
from collections.abc import Callable

_BACK = 256  # letters, behind which a name in the midst of arguments would begin
_PIECES = re.compile("(?=<)|(?<=})")


def parse_tag_by_tag(original: Callable, parser, chunk_text: str) -> tuple[str, list]:
    """What: ``FunctionCallParser.parse_stream_chunk`` is given a chunk in pieces: before a tag one ends, and behind a brace.
    Why: SGLang's parser takes one step for each chunk: of a chunk with text and the beginning of a call it drops the text, of one with two calls the
    second. A stride makes such chunks, and so do a client that reads slowly and ``--stream-interval``. In AR serving as well.
    Guard: the hook applied; a test cuts an answer at random, and compares it with the answer letter by letter.
    Goes when: SGLang's parser takes all steps that a chunk has.
    """
    text, calls = "", []
    for piece in _PIECES.split(chunk_text) if _steps(parser.detector) else (chunk_text,):
        more, found = original(parser, piece)
        text, calls = text + (more or ""), calls + found
    return text, calls


def parse_to_the_end(original: Callable, parser) -> tuple[str, list]:
    """What: ``FunctionCallParser.parse_stream_end`` first takes the steps that are left in what the parser holds; the last as for a last letter.
    Why: with the hook above: of a call whose name came with the last chunk the arguments are lost. And of arguments that are cut off it
    passes on what two steps agree upon, so that they would depend on the length of the last chunk.
    Guard: with the hook above.
    Goes when: with the hook above.
    """
    text, calls, detector = "", [], parser.detector
    held = detector._buffer if _steps(detector) else ""

    def step(piece: str) -> None:
        nonlocal text
        more, found = parser.parse_stream_chunk(piece)
        text += more
        calls.extend(call for call in found if call.name or call.parameters)

    def arguments(letters: int):
        """Those of the first letters of what is held, once all steps are taken that they allow."""
        detector._buffer = held[:letters]
        del detector.prev_tool_call_arr[max(detector.current_tool_id, 0) :]
        step("")
        step("")
        return (detector.prev_tool_call_arr[detector.current_tool_id :] or [{}])[0].get("arguments")

    if detector.bot_token in held:
        known = list(detector.prev_tool_call_arr)
        whole = arguments(len(held))
        if len(detector.prev_tool_call_arr) < len(known):
            # What is held is no JSON: what was understood before stays, SGLang sends the rest of it.
            detector._buffer, detector.prev_tool_call_arr[:] = held, known
        if detector._buffer == held and whole:
            # Cut off: back to where they were others, and on from there.
            before = next((n for n in range(len(held) - 1, max(0, len(held) - _BACK), -1) if arguments(n) != whole), 0)
            if before:
                step(held[before:])
            else:
                arguments(len(held))
    more, found = original(parser)
    return text + more, calls + found


def _steps(detector) -> bool:
    """Detectors whose steps are the common ones, which need a call's tags and JSON alone; others may hold their tags in one piece."""
    from sglang.srt.function_call.base_format_detector import BaseFormatDetector
    from sglang.srt.function_call.qwen25_detector import Qwen25Detector

    return type(detector).parse_streaming_increment in (BaseFormatDetector.parse_streaming_increment, Qwen25Detector.parse_streaming_increment)
