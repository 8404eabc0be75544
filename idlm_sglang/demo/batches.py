"""Training rows: 256 clean tokens, then 24 blocks of 7 MASK tokens, with their positions, attention mask and labels."""

import random
from dataclasses import dataclass
from typing import Iterator

import torch

ROW_TOKENS, BLOCKS, BLOCK_MASKS = 256, 24, 7
NO_LABEL = -100
MAX_GAP = 1500  # the largest jump in position between two conversations of a row


@dataclass(frozen=True)
class Batch:
    """Rows of `T = ROW_TOKENS + BLOCKS * BLOCK_MASKS` inputs (T = 424).

    input_ids, positions: (B, T) int64. visible: (B, 1, T, T) bool, True where a query (row) may see a key (column).
    labels: (B, T) int64, the token that each row has to predict (the next one: logits are shifted), or NO_LABEL.
    same_token: (B, T - ROW_TOKENS) int64, for each MASK row the clean row that predicts the same token.
    """
    input_ids: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor
    labels: torch.Tensor
    same_token: torch.Tensor


def build_row(conversations: Iterator[tuple[list[int], list[bool]]], mask_id: int, rng: random.Random):
    """One row of a Batch (the same five tensors without the batch dimension).

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
    clean_positions = torch.tensor(positions[:ROW_TOKENS])

    labels = torch.full((ROW_TOKENS + BLOCKS * BLOCK_MASKS,), NO_LABEL)
    predicts = [i for i in range(ROW_TOKENS - 1) if answer[i + 1]]
    labels[predicts] = torch.tensor(ids)[[i + 1 for i in predicts]]

    # A block starts behind clean token t; its mask j = 1..7 stands at t + j and predicts token t + j + 1, inside the same answer.
    anchors = [i for i in predicts if i + 2 < ROW_TOKENS and answer[i + 2]]
    anchors = rng.sample(anchors, BLOCKS) if len(anchors) >= BLOCKS else rng.choices(anchors or [0], k=BLOCKS)
    t = torch.tensor(sorted(anchors)).repeat_interleave(BLOCK_MASKS)
    j = torch.arange(1, BLOCK_MASKS + 1).repeat(BLOCKS)
    same_token = (t + j).clamp(max=ROW_TOKENS - 1)
    target = labels[:ROW_TOKENS][same_token]
    inside = (labels[:ROW_TOKENS][same_token] != NO_LABEL).view(BLOCKS, BLOCK_MASKS).cumprod(1).bool().flatten() & (t + j < ROW_TOKENS)
    labels[ROW_TOKENS:] = torch.where(inside, target, torch.tensor(NO_LABEL))

    index = torch.arange(ROW_TOKENS)
    clean_sees_clean = (index[None, :] <= index[:, None]) & (doc[None, :] == doc[:, None])
    mask_sees_clean = (index[None, :] <= t[:, None]) & (doc[None, :] == doc[t][:, None])
    block = torch.arange(BLOCKS).repeat_interleave(BLOCK_MASKS)
    mask_sees_mask = (block[None, :] == block[:, None]) & (j[None, :] <= j[:, None])
    visible = torch.zeros(len(labels), len(labels), dtype=torch.bool)
    visible[:ROW_TOKENS, :ROW_TOKENS] = clean_sees_clean
    visible[ROW_TOKENS:, :ROW_TOKENS] = mask_sees_clean
    visible[ROW_TOKENS:, ROW_TOKENS:] = mask_sees_mask

    input_ids = torch.cat([torch.tensor(ids), torch.full((BLOCKS * BLOCK_MASKS,), mask_id)])
    return input_ids, torch.cat([clean_positions, clean_positions[t] + j]), visible, labels, same_token


def build_batch(conversations: Iterator[tuple[list[int], list[bool]]], mask_id: int, rng: random.Random, rows: int) -> Batch:
    """`rows` rows from encoded conversations (ids, which of them are an answer)."""
    ids, positions, visible, labels, same_token = (torch.stack(x) for x in zip(*(build_row(conversations, mask_id, rng) for _ in range(rows))))
    return Batch(ids, positions, visible[:, None], labels, same_token)
