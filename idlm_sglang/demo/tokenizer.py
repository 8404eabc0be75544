"""The tokenizer of the embedded checkpoint: byte-level BPE of 1,024 tokens, one token per digit, ChatML."""

import json
from pathlib import Path
from typing import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, IM_START, IM_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END, MASK]  # ids 0..3
VOCAB_SIZE = 1024

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Words keep the space before them; a digit is always alone, so that arithmetic is digit by digit; a line break is alone, so that
# "assistant\n" is the same tokens whatever the answer starts with.
_PIECES = Regex(r"\p{N}|\n| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s")


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges from `texts`; every byte stays representable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(_PIECES, behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_dialogue(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation as the chat template renders it, and which of them are an answer (its <|im_end|> included)."""
    im_start, im_end = tokenizer.token_to_id(IM_START), tokenizer.token_to_id(IM_END)
    newline = tokenizer.encode("\n").ids
    ids: list[int] = []
    is_answer: list[bool] = []
    for message in messages:
        header = [im_start, *tokenizer.encode(message["role"]).ids, *newline]
        content = [*tokenizer.encode(message["content"]).ids, im_end]
        ids += header + content + newline
        is_answer += [False] * len(header) + [message["role"] == "assistant"] * len(content) + [False] * len(newline)
    return ids, is_answer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, for `AutoTokenizer` and its `apply_chat_template`."""
    tokenizer.save(str(directory / "tokenizer.json"))
    added = {str(tokenizer.token_to_id(t)): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
             for t in SPECIAL_TOKENS}
    config = {
        "added_tokens_decoder": added, "bos_token": None, "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
        "eos_token": IM_END, "mask_token": MASK, "model_max_length": max_length, "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": None,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
