"""Training rows of the embedded checkpoint: 256 clean tokens, then 24 blocks of MASK tokens (see convert/rows.py)."""

import random
from typing import Iterator

import torch

from idlm_sglang.convert.rows import Batch, clean_labels, stack, with_masks

ROW_TOKENS, BLOCKS = 256, 24
MAX_GAP = 1500  # the largest jump in position between two conversations of a row


def build_row(conversations: Iterator[tuple[list[int], list[bool]]], mask_id: int, rng: random.Random, size: int) -> Batch:
    """One row (B = 1, C = ROW_TOKENS, M = BLOCKS * size).

    Whole conversations fill the row, the last one is cut. In half of the rows they see the earlier ones, sometimes from far away, as
    in a long chat; in the other half each one is alone.
    """
    ids: list[int] = []
    answer: list[bool] = []
    document: list[int] = []
    positions: list[int] = []
    while len(ids) < ROW_TOKENS:
        new_ids, new_answer = next(conversations)
        start = positions[-1] + 1 if positions else 0
        if positions and rng.random() < 0.3:
            start += rng.randrange(MAX_GAP)
        ids += new_ids
        answer += new_answer
        document += [document[-1] + 1 if document else 0] * len(new_ids)
        positions += range(start, start + len(new_ids))
    ids, answer = ids[:ROW_TOKENS], answer[:ROW_TOKENS]
    alone = rng.random() < 0.5
    doc = torch.tensor(document[:ROW_TOKENS] if alone else [0] * ROW_TOKENS)

    labels, predicts = clean_labels(ids, answer)
    anchors = [i for i in predicts if i + 2 < ROW_TOKENS and answer[i + 2]]
    anchors = rng.sample(anchors, BLOCKS) if len(anchors) >= BLOCKS else rng.choices(anchors or [0], k=BLOCKS)
    return with_masks(ids, doc, torch.tensor(positions[:ROW_TOKENS]), labels, torch.tensor(sorted(anchors)), size, mask_id)


def build_batch(conversations: Iterator[tuple[list[int], list[bool]]], mask_id: int, rng: random.Random, rows: int, size: int) -> Batch:
    """`rows` rows from encoded conversations (ids, which of them are an answer), with blocks of `size` MASKs."""
    return stack([build_row(conversations, mask_id, rng, size) for _ in range(rows)])
