"""The base's own answers in place of the data's, so that drafts are trained on the text they will be verified on."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from idlm_sglang.config import SettingError
from idlm_sglang.convert import chats
from idlm_sglang.convert.chats import Encoder, Messages

BATCH = 32
_TOGETHER = 8
FILE = "answers.jsonl"


@torch.inference_mode()
def regenerate(source: list[Messages], path: Path, answer: Callable[[list[Messages]], list[str | None]], seed: int, tell: Callable[[str], None]) -> list[Messages]:
    """The conversations with every answer written anew, one after the other; those with an answer that does not end are left out.

    They are kept in `path`, batch by batch in `path`.part, from which an interrupted run goes on. Each batch has a torch seed of its own.
    """
    if path.is_file():
        return chats.read(path)
    part = path.with_name(path.name + ".part")
    start = _keep_whole_batches(part)
    for first in range(start, len(source), BATCH):
        torch.manual_seed(zlib.crc32(f"{seed}-{first}".encode()))
        done = _batch(source[first : first + BATCH], answer)
        with part.open("a", encoding="utf-8") as file:
            for i, messages in enumerate(done):
                file.write(json.dumps({"conversation": first + i, "messages": messages}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        tell(f"answers of the base: {min(first + BATCH, len(source))}/{len(source)} conversations")
    lines = [line for line in part.read_text(encoding="utf-8").split("\n") if line and json.loads(line)["messages"]]
    if len(lines) < 2:
        raise SettingError(f"--self-distill: only {len(lines)} of {len(source)} conversations have answers that end; allowed: a larger --length, or other data")
    if len(lines) < len(source):
        tell(f"left out: {len(source) - len(lines)} of {len(source)} conversations, whose prompt or an answer of the base is longer than --length")
    ready = path.with_name(path.name + ".new")
    ready.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(ready, path)
    part.unlink()
    return chats.read(path)


def _keep_whole_batches(part: Path) -> int:
    """Cut the file behind its last whole batch; the index of the first conversation that is missing."""
    lines = part.read_text(encoding="utf-8").split("\n")[:-1] if part.is_file() else []
    start = len(lines) // BATCH * BATCH
    part.write_text("".join(line + "\n" for line in lines[:start]), encoding="utf-8")
    return start


def _batch(source: list[Messages], answer: Callable[[list[Messages]], list[str | None]]) -> list[Messages]:
    """The conversations of a batch with new answers, an empty one where an answer did not end."""
    made: list[Messages] = [[] for _ in source]
    running = list(range(len(source)))
    while running:
        for i in running:
            while (message := source[i][len(made[i])])["role"] != "assistant":
                made[i].append(message)
        texts = answer([made[i] for i in running])
        for i, text in zip(list(running), texts):
            if not text:
                made[i] = []
                running.remove(i)
                continue
            made[i].append({"role": "assistant", "content": text})
            if len(made[i]) == len(source[i]):
                running.remove(i)
    return made


def answers_of(model: Any, tokenizer: Any, encoder: Encoder, mask_id: int, temperature: float, length: int) -> Callable[[list[Messages]], list[str | None]]:
    """A function that continues conversations with the model's answers, None where one does not end within `length` tokens in all."""
    device = next(model.parameters()).device
    stops = {tokenizer.eos_token_id, *_as_list(getattr(model.generation_config, "eos_token_id", None))}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}

    def answer(started: list[Messages]) -> list[str | None]:
        every = [encoder.prompt(messages) for messages in started]
        texts: list[str | None] = [None] * len(every)
        # Those alike in length share a batch, so that a long prompt takes room from none but its like.
        order = sorted((i for i, prompt in enumerate(every) if len(prompt) < length), key=lambda i: len(every[i]))
        for first in range(0, len(order), _TOGETHER):
            some = order[first : first + _TOGETHER]
            for i, text in zip(some, generated([every[i] for i in some])):
                texts[i] = text
        return texts

    def generated(prompts: list[list[int]]) -> list[str | None]:
        longest = max(map(len, prompts))
        room = length - longest
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
        real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        trained_with = model.config._attn_implementation
        model.eval().set_attn_implementation("sdpa")
        output = model.generate(input_ids=ids, attention_mask=real, max_new_tokens=room, pad_token_id=pad, eos_token_id=sorted(stops),
                                bad_words_ids=[[mask_id]], **sampling)[:, longest:].tolist()
        model.train().set_attn_implementation(trained_with)
        texts: list[str | None] = []
        for tokens in output:
            end = next((i for i, token in enumerate(tokens) if token in stops), None)
            texts.append(None if end is None else tokenizer.decode(tokens[:end], skip_special_tokens=True))
        return texts

    return answer


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
