"""Blocks of MASKs tile the answers: each token of an answer behind its second is predicted once."""

import random

import torch

from idlm_sglang.convert import base as bases
from idlm_sglang.convert import chats
from idlm_sglang.convert.rows import NO_LABEL, build_batch
from idlm_sglang.demo.corpus import training_dialogues
from idlm_sglang.demo.tokenizer import encode_dialogue


def test_every_mask_predicts_a_token_of_its_answer_and_none_is_predicted_twice(base, data):
    stream = iter(chats.Stream(chats.read(data), chats.Encoder(bases.load_tokenizer(str(base))), 96, 0))
    rng = random.Random(1)
    for size in 1, 2, 3, 7:
        batch = build_batch(stream, 3, rng, 3, 96, size)
        c = batch.clean
        for ids, labels, twin, offset, positions, visible in zip(batch.input_ids, batch.labels, batch.same_token, batch.offsets, batch.positions, batch.visible[:, 0]):
            wanted = labels[c:] != NO_LABEL
            assert wanted.any() and torch.equal(labels[c:][wanted], ids[twin + 1][wanted]) and torch.equal(labels[c:][wanted], labels[twin][wanted])
            assert len(set(twin[wanted].tolist())) == int(wanted.sum())
            assert torch.equal(positions[c:][wanted], positions[twin][wanted])
            for m in wanted.nonzero().flatten().tolist():
                anchor, j = int(twin[m] - offset[m]), int(offset[m])
                seen = visible[c + m].nonzero().flatten().tolist()
                assert seen[-j:] == list(range(c + m - j + 1, c + m + 1)), "the masks of its block up to itself"
                text = seen[:-j]
                assert text == list(range(text[0], anchor + 1)) and ids[text[0]] == 1, "the conversation from its <|im_start|> to the anchor"


def test_encoding_is_the_chat_templates_and_marks_the_answers(base):
    tokenizer = bases.load_tokenizer(str(base))
    encoder, stream = chats.Encoder(tokenizer), training_dialogues(5)
    for _ in range(50):
        messages = next(stream).messages()
        assert encoder(messages) == tuple(encode_dialogue(tokenizer.backend_tokenizer, messages))


def test_a_template_that_drops_earlier_thinking_leaves_the_last_answer(base):
    tokenizer = bases.load_tokenizer(str(base))
    tokenizer.chat_template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
                               "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>a</think>One"}] * 2
    ids, answer = chats.Encoder(tokenizer)(turns)
    assert tokenizer.decode([i for i, a in zip(ids, answer) if a]) == "<think>a</think>One<|im_end|>"
