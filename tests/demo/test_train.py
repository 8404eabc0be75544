"""The training script gives the same files for the same seed, shows progress, and builds the rows that it documents."""

import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from idlm_sglang.convert.rows import NO_LABEL
from idlm_sglang.demo import CHECKPOINT_DIR
from idlm_sglang.demo.batches import BLOCKS, ROW_TOKENS, build_row
from idlm_sglang.demo.corpus import training_dialogues
from idlm_sglang.demo.tokenizer import encode_dialogue
from idlm_sglang.demo.train import BLOCK_SIZES, model_config

MASK_ID = 3


def _train(out: Path) -> tuple[dict[str, str], str]:
    """Run the command for 20 small steps: sha256 of every file it wrote, and what it printed."""
    command = [sys.executable, "-m", "idlm_sglang.demo.train", "--out", str(out), "--steps", "20", "--rows", "1"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.iterdir())}, printed


def test_training_twice_gives_the_same_files(tmp_path):
    first, printed = _train(tmp_path / "first")
    second, _ = _train(tmp_path / "second")
    print(f"model.safetensors after 20 steps: {first['model.safetensors']}")
    assert first == second
    assert set(first) == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert re.search(r"step 20/20 .* min left", printed)
    assert first["model.safetensors"] in printed


def _rows(count: int, size: int):
    tokenizer = Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json"))
    conversations = (encode_dialogue(tokenizer, item.messages()) for item in training_dialogues(7))
    rng = random.Random(7)
    for _ in range(count):
        row = build_row(conversations, MASK_ID, rng, size)
        yield row.input_ids[0], row.positions[0], row.visible[0, 0], row.labels[0], row.same_token[0]


@pytest.mark.parametrize("size", sorted(set(BLOCK_SIZES)))
def test_every_row_predicts_the_next_token_of_an_answer(size):
    for ids, positions, visible, labels, same_token in _rows(10, size):
        clean = ids[:ROW_TOKENS].tolist()
        for i in range(ROW_TOKENS):
            assert labels[i] in (NO_LABEL, *clean[i + 1: i + 2])
        for m in range(BLOCKS * size):
            label = labels[ROW_TOKENS + m]
            assert ids[ROW_TOKENS + m] == MASK_ID
            if label != NO_LABEL:
                twin = same_token[m]
                assert label == clean[twin + 1] == labels[twin]
                assert positions[ROW_TOKENS + m] == positions[twin]


@pytest.mark.parametrize("size", sorted(set(BLOCK_SIZES)))
def test_a_mask_sees_the_text_before_its_block_and_the_earlier_masks_of_its_block_only(size):
    for ids, positions, visible, labels, same_token in _rows(10, size):
        for block in range(BLOCKS):
            first = block * size
            anchor = int(same_token[first]) - 1
            for j in range(size):
                seen = visible[ROW_TOKENS + first + j].nonzero().flatten().tolist()
                masks = [ROW_TOKENS + first + i for i in range(j + 1)]
                assert seen[-len(masks):] == masks
                text = seen[: -len(masks)]
                assert text == list(range(text[0], anchor + 1))
        assert not visible[:ROW_TOKENS, ROW_TOKENS:].any(), "text never sees a MASK"
        assert not torch.triu(visible[:ROW_TOKENS, :ROW_TOKENS], 1).any(), "attention is causal"


def test_a_checkpoint_names_the_longest_blocks_that_it_was_trained_on():
    tokenizer = Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json"))
    shipped = json.loads((CHECKPOINT_DIR / "config.json").read_text())
    assert shipped == model_config(tokenizer) and shipped["block_size"] == max(BLOCK_SIZES) == BLOCK_SIZES[-1]
    assert "block_size" not in model_config(tokenizer, ar_only=True)
