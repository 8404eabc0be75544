"""Conversations: read from JSONL, checked line by line, split, and encoded with the base's chat template."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from idlm_sglang.config import SettingError

Messages = list[dict[str, Any]]
Encoded = tuple[list[int], list[bool]]  # token ids, and which of them are an answer

_SHAPE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


def read(path: Path) -> list[Messages]:
    """The conversations of a JSONL file, blank lines left out. :class:`SettingError` names the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"--data {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    chats = [_conversation(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if len(chats) < 2:
        raise SettingError(f"--data {path} has {len(chats)} conversations; allowed: 2 or more, some are held out")
    return chats


def _conversation(path: Path, number: int, line: str) -> Messages:
    def wrong(what: str) -> SettingError:
        return SettingError(f"--data {path}, line {number}: {what}; allowed: {_SHAPE}")

    try:
        messages = json.loads(line)["messages"]
    except (ValueError, TypeError, KeyError):
        raise wrong("no JSON object with messages") from None
    if not isinstance(messages, list) or not messages:
        raise wrong("messages is not a list with entries")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise wrong("a message without a role and a content that are text")
    if not any(m["role"] == "assistant" and m["content"] for m in messages):
        raise wrong("no answer (role assistant) to train on")
    while messages[-1]["role"] != "assistant":
        messages.pop()
    return messages


def split(chats: list[Messages], share: float, seed: int) -> tuple[list[Messages], list[Messages]]:
    """(to train on, held out), both in an order that the seed gives. Equal conversations are on one side.

    Raises :class:`SettingError` where all are equal.
    """
    shuffled = random.Random(f"split-{seed}").sample(chats, len(chats))
    count = min(max(1, round(share * len(chats))), len(chats) - 1)
    alike = {json.dumps(one) for one in shuffled[:count]}
    train = [one for one in shuffled[count:] if json.dumps(one) not in alike]
    if not train:
        raise SettingError(f"--data: all {len(chats)} conversations equal held-out ones; allowed: conversations that differ")
    return train, shuffled[:count]


class Encoder:
    """Conversations as the chat template renders them, each answer tokenized by itself behind its prompt, as in service."""

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            raise SettingError("BASE has no chat template in its tokenizer; allowed: a chat model")
        if tokenizer.eos_token is None:
            raise SettingError("BASE's tokenizer has no eos_token; allowed: a chat model, whose answers end with one")
        self._tokenizer = tokenizer

    def __call__(self, messages: Messages) -> Encoded:
        """Token ids and which of them are an answer, its stop token included.

        Where the template renders earlier answers in another way than they were given (without their thinking), the last one is the only one.
        """
        text, end, spans = self._render(messages), 0, []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or not message["content"]:
                continue
            before, through = self._render(messages[:i], prompt=True), self._render(messages[: i + 1])
            if text.startswith(before) and text.startswith(through.rstrip()) and end <= len(before) < len(through):
                stop = text.find(self._tokenizer.eos_token, len(before), len(through))
                end = len(through.rstrip()) if stop < 0 else stop + len(self._tokenizer.eos_token)
                spans.append((len(before), end))
        if not spans:
            raise SettingError("BASE's chat template does not put an answer behind its prompt (add_generation_prompt); another template is needed")
        ids: list[int] = []
        answer: list[bool] = []
        at = 0
        for start, stop in spans:
            for piece, is_answer in (text[at:start], False), (text[start:stop], True):
                new = self._ids(piece)
                ids += new
                answer += [is_answer] * len(new)
            at = stop
        rest = self._ids(text[at:])
        return ids + rest, answer + [False] * len(rest)

    def prompt(self, messages: Messages) -> list[int]:
        """Token ids up to where the next answer begins."""
        return self._ids(self._render(messages, prompt=True))

    def _render(self, messages: Messages, prompt: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # whatever a template raises
            roles = ", ".join(m["role"] for m in messages)
            raise SettingError(f"BASE's chat template refuses a conversation with the roles {roles}: {error}") from None

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


class Stream:
    """Conversations without end, every one once per pass, in an order that the seed and the pass give. Its position can be stored.

    Conversations with fewer than two tokens of an answer among their first `length` are left out: no MASK has a label there.
    """

    def __init__(self, chats: list[Messages], encoder: Encoder, length: int, seed: int):
        self._encoder, self._length, self._seed = encoder, length, seed
        self._chats: list[Messages] = chats
        self.position = (0, 0)  # pass, conversation

    def __iter__(self) -> Iterator[Encoded]:
        while True:
            turn, index = self.position
            order = random.Random(f"order-{self._seed}-{turn}").sample(range(len(self._chats)), len(self._chats))
            useful = index > 0
            while index < len(order):
                ids, answer = self._encoder(self._chats[order[index]])
                index += 1
                self.position = (turn, index)
                if any(a and b for a, b in zip(answer, answer[1 : self._length])):
                    useful = True
                    yield ids, answer
            if not useful:
                raise SettingError(f"--length {self._length}: no conversation has two tokens of an answer among its first {self._length}; allowed: a larger one")
            self.position = (turn + 1, 0)
