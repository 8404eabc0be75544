"""Figures of a trained adapter or model on held-out conversations, without decoding: acceptance by position, predicted tokens per forward."""

from collections.abc import Callable, Iterable

import torch

from idlm_sglang.convert.chats import Encoded
from idlm_sglang.convert.rows import NO_LABEL, Batch, clean_labels, tiles, with_masks
from idlm_sglang.isd.stride import tokens_per_round


# Blocks whose distributions are made at a time, on the device of their logits.
_BLOCKS = 64


class Acceptance:
    """P(draft j accepted | drafts before it accepted): greedy (argmax equal) and at temperature 1 (sum of min(p, q)), over blocks of K MASKs."""

    def __init__(self, size: int):
        self.drafts = 0
        self._tried = torch.zeros(2, size, dtype=torch.float64)
        self._accepted = torch.zeros(2, size, dtype=torch.float64)

    def add(self, drafts: torch.Tensor, verifiers: torch.Tensor, wanted: torch.Tensor) -> None:
        """drafts, verifiers: (blocks, K, V) logits of MASK rows and of the clean rows that verify them. wanted: (blocks, K) bool."""
        equal = (drafts.argmax(-1) == verifiers.argmax(-1)).double()
        overlap = torch.minimum(drafts.softmax(-1), verifiers.softmax(-1)).sum(-1).clamp(max=1).double()
        chance = torch.stack([equal, overlap]).cpu() * wanted.cpu()
        reach = torch.cat([torch.ones_like(chance[..., :1]), chance[..., :-1]], -1).cumprod(-1) * wanted.cpu()
        self._tried += reach.sum(1)
        self._accepted += (reach * chance).sum(1)
        self.drafts += int(wanted.sum())

    def figures(self) -> dict[str, dict]:
        """By mode: acceptance by position, and the tokens per forward that follow at each stride, without salvage."""
        result = {}
        for mode, tried, accepted in zip(("greedy", "temperature 1"), self._tried, self._accepted):
            p = [float(a / t) if t else 0.0 for a, t in zip(accepted, tried)]
            result[mode] = {"accepted_by_position": p, "tokens_per_forward": {str(n): tokens_per_round(p, None, n) for n in range(2, len(p) + 2)}}
        return result


def on_answers(encoded: Iterable[Encoded], logits: Callable[[Batch], torch.Tensor], mask_id: int, length: int, size: int) -> Acceptance:
    """Acceptance over conversations, each a row of its own and cut to `length`: drafts behind the data's own tokens (teacher forcing).

    logits: of a batch, (B, T, V); MASK can neither be drafted nor be the answer.
    """
    result = Acceptance(size)
    for ids, answer in encoded:
        ids, answer = ids[:length], answer[:length]
        labels, predicts = clean_labels(ids, answer)
        anchors = tiles(predicts, size, 0)
        if not anchors:
            continue
        row = with_masks(ids, torch.zeros(len(ids), dtype=torch.int64), torch.arange(len(ids)), labels, torch.tensor(anchors), size, mask_id)
        made, wanted = logits(row)[0], row.labels[0, row.clean :] != NO_LABEL
        for first in range(0, len(wanted), _BLOCKS * size):
            part = slice(first, first + _BLOCKS * size)
            drafts, verifiers = (rows.float().index_fill(1, _at(mask_id, rows), float("-inf")) for rows in (made[row.clean :][part], made[row.same_token[0][part]]))
            result.add(drafts.view(-1, size, drafts.shape[1]), verifiers.view(-1, size, drafts.shape[1]), wanted[part].view(-1, size))
    return result


def _at(column: int, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([column], device=like.device)
