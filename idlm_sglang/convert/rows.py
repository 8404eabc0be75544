"""Training rows: clean tokens, then blocks of MASK tokens behind some of them, with positions, attention mask and labels.

This is the paper's `[x_masked | x_clean]` with the halves in the other order: a MASK sees the clean tokens before its block and the
earlier MASKs of its block, the clean tokens see clean tokens only, and positions repeat.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

NO_LABEL = -100
_UNIT = 64  # MASKs: rows are filled up to a multiple, since each new shape costs a CPU time and memory for its kernels


@dataclass(frozen=True)
class Batch:
    """Rows of T inputs: C clean tokens, then M MASK tokens.

    input_ids, positions: (B, T) int64. visible: (B, 1, T, T) bool, True where a query (row) may see a key (column).
    labels: (B, T) int64, the token that each row has to predict (the next one: logits are shifted), or NO_LABEL.
    same_token: (B, M) int64, for each MASK row the clean row that predicts the same token.
    offsets: (B, M) int64, j = 1, 2, ... of each MASK in its block.
    """
    input_ids: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor
    labels: torch.Tensor
    same_token: torch.Tensor
    offsets: torch.Tensor

    @property
    def clean(self) -> int:
        """C, clean tokens per row."""
        return self.labels.shape[1] - self.same_token.shape[1]

    @property
    def mask_rows(self) -> torch.Tensor:
        """(B, T) bool, the rows that play the MASK role: the gate of an adapter."""
        return (torch.arange(self.labels.shape[1], device=self.labels.device) >= self.clean).expand(self.labels.shape)

    def without_masks(self) -> "Batch":
        """The clean tokens alone (M = 0), as an AR model is trained."""
        c = slice(self.clean)
        return Batch(self.input_ids[:, c], self.positions[:, c], self.visible[:, :, c, c], self.labels[:, c], self.same_token[:, :0], self.offsets[:, :0])

    def unseen(self, dtype: torch.dtype) -> torch.Tensor:
        """The additive attention mask: (B, 1, T, T), 0 or -inf."""
        return torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device).masked_fill(~self.visible, float("-inf"))

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def clean_labels(ids: list[int], answer: list[bool]) -> tuple[torch.Tensor, list[int]]:
    """What each clean row predicts, (C,) int64 or NO_LABEL, and the indices of the rows that predict a token of an answer."""
    labels = torch.full((len(ids),), NO_LABEL)
    predicts = [i for i in range(len(ids) - 1) if answer[i + 1]]
    labels[predicts] = torch.tensor(ids)[[i + 1 for i in predicts]]
    return labels, predicts


def with_masks(ids: list[int], document: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor, anchors: torch.Tensor, size: int, mask_id: int) -> Batch:
    """One row (B = 1) of clean tokens with a block of `size` MASKs behind each anchor.

    A block starts behind clean token t; its mask j = 1..size stands at t + j and predicts token t + j + 1, as long as that belongs to the same
    answer.

    ids: C token ids. document, positions, labels: (C,) int64; a token sees earlier ones of its own document. anchors: (blocks,) int64, each t.
    """
    c, blocks = len(ids), len(anchors)
    t = anchors.repeat_interleave(size)
    j = torch.arange(1, size + 1).repeat(blocks)
    same_token = (t + j).clamp(max=c - 1)
    missing = (labels == NO_LABEL).cumsum(0)
    inside = (missing[same_token] == missing[t]) & (t + j < c)
    mask_labels = torch.where(inside, labels[same_token], torch.tensor(NO_LABEL))

    index = torch.arange(c)
    visible = torch.zeros(c + len(t), c + len(t), dtype=torch.bool)
    visible[:c, :c] = (index[None, :] <= index[:, None]) & (document[None, :] == document[:, None])
    visible[c:, :c] = (index[None, :] <= t[:, None]) & (document[None, :] == document[t][:, None])
    block = torch.arange(blocks).repeat_interleave(size)
    visible[c:, c:] = (block[None, :] == block[:, None]) & (j[None, :] <= j[:, None])
    row = (torch.cat([torch.tensor(ids), torch.full((len(t),), mask_id)]), torch.cat([positions, positions[t] + j]), visible[None],
           torch.cat([labels, mask_labels]), same_token, j)
    return Batch(*(x[None] for x in row))


def stack(rows: list[Batch]) -> Batch:
    """Rows of one shape as one batch."""
    return Batch(*(torch.cat([getattr(row, f.name) for row in rows]) for f in fields(Batch)))


def tiles(predicts: list[int], size: int, phase: int) -> list[int]:
    """Anchors of blocks that lie one behind the other over every answer, from `phase` (0 to size - 1) tokens into it.

    predicts: the clean rows that predict a token of an answer; the first of an answer is the last token of its prompt.
    """
    wanted, first = set(predicts), 0
    anchors = []
    for i in predicts:
        first = first if i - 1 in wanted else i
        if i + 1 in wanted and (i - first) % size == phase:
            anchors.append(i)
    return anchors


def packed(conversations: Iterator[tuple[list[int], list[bool]]], length: int) -> tuple[list[int], list[bool], torch.Tensor, torch.Tensor]:
    """`length` tokens of whole conversations, the last one cut, each of which sees itself alone: ids, answer, document, positions."""
    ids: list[int] = []
    answer: list[bool] = []
    starts: list[int] = []
    while len(ids) < length:
        new_ids, new_answer = next(conversations)
        starts.append(len(ids))
        ids += new_ids
        answer += new_answer
    starts_at = torch.tensor(starts)
    document = torch.searchsorted(starts_at, torch.arange(length), right=True) - 1
    return ids[:length], answer[:length], document, torch.arange(length) - starts_at[document]


def build_batch(conversations: Iterator[tuple[list[int], list[bool]]], mask_id: int, rng: random.Random, rows: int, length: int, size: int) -> Batch:
    """`rows` rows of `length` clean tokens, their answers tiled with blocks of `size` MASKs; rows with fewer blocks are filled up without labels.

    conversations: encoded, (ids, which of them are an answer), without end; each with two tokens of an answer among its first `length`.
    """
    made = []
    for _ in range(rows):
        ids, answer, document, positions = packed(conversations, length)
        labels, predicts = clean_labels(ids, answer)
        anchors = tiles(predicts, size, rng.randrange(size)) or tiles(predicts, size, 0)
        made.append((ids, document, positions, labels, anchors))
    unit = -(-_UNIT // size)
    most = -(-max(len(row[-1]) for row in made) // unit) * unit
    result = []
    for ids, document, positions, labels, anchors in made:
        fill = most - len(anchors)
        row = with_masks(ids, document, positions, labels, torch.tensor(anchors + [0] * fill, dtype=torch.int64), size, mask_id)
        if fill:
            row.labels[:, -fill * size:] = NO_LABEL
        result.append(row)
    return stack(result)
