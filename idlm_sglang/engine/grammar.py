"""Grammars (JSON schema, regex, EBNF, structural tags, strict reasoning) over the drafts of a step.

The automaton lives on the host and stands behind the pending token. It is walked over a request's drafts, which gives
the allowed tokens of every verifying row, and rolled back. On the way

- where one token only is allowed, that token becomes the draft, also in a step that had none: it is accepted with
  certainty. Which rows are forced depends on the drafts in front of them alone;
- a draft that the grammar forbids, or that completes it, ends the drafts: the row in front of it decides instead, and
  the MASK rows behind stay useful.

Both choices look at drafts, which is exact for the greedy and the coupled rule (what they emit never depends on the
drafts); requests with a grammar therefore never use the rejection rule. MASK rows know no grammar.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch

from idlm_sglang.engine.state import Carried
from idlm_sglang.engine.transfer import on_device

logger = logging.getLogger(__name__)

# Backends whose automaton can be rolled back. Outlines' cannot: its requests decode one token per step.
STRIDED_BACKENDS = ("xgrammar", "llguidance")


@dataclass
class Walk:
    """The drafts of one request behind the walk over its grammar.

    Attributes:
        drafts: token ids; forced: which of them the grammar leaves no choice about.
        failed: what the grammar's library raised, or None.
    """

    drafts: list[int]
    forced: list[bool]
    failed: Exception | None = None


def only_token(words: np.ndarray) -> int | None:
    """The token id of a packed bitmask ``(V / 32,)`` uint32 that allows exactly one, else None."""
    (used,) = words.nonzero()
    if len(used) != 1:
        return None
    word = int(words[used[0]])
    return int(used[0]) * 32 + word.bit_length() - 1 if word & (word - 1) == 0 else None


def allows(words: np.ndarray, token: int) -> bool:
    """Whether a packed bitmask allows a token."""
    return token // 32 < len(words) and bool(int(words[token // 32]) >> (token % 32) & 1)


def walk(grammar, drafts: list[int], limit: int, mask: torch.Tensor, first_row: int, mask_id: int, vocab: int) -> Walk:
    """Fill the rows ``first_row ..`` of a packed vocabulary mask along the drafts of one request.

    Args:
        grammar: SGLang's grammar object; it is left as it was found.
        drafts: the valid drafts.
        limit: the most drafts the request may carry.
        mask: packed int32 bitmask on the host, all ones where no row has been filled.
        mask_id: never made a draft.
        vocab: size of the model's vocabulary, which a mask may exceed.
    """
    kept: list[int] = []
    forced: list[bool] = []
    if grammar.is_terminated():
        # SGLang commits one token per step behind the end of a grammar (ignore_eos).
        return Walk(kept, forced)
    words = mask.numpy().view(np.uint32)
    try:
        for i in range(limit + 1):
            grammar.fill_vocab_mask(mask, first_row + i)
            if i == limit:
                break
            row = words[first_row + i]
            token = only_token(row)
            is_forced = token is not None and token != mask_id and token < vocab
            if not is_forced:
                if i >= len(drafts) or not allows(row, drafts[i]):
                    break
                token = drafts[i]
            grammar.accept_token(token)
            if grammar.is_terminated():
                grammar.rollback(1)
                break
            kept.append(token)
            forced.append(is_forced)
        if kept:
            grammar.rollback(len(kept))
    except Exception as error:
        logger.exception("idlm: a grammar failed")
        return Walk([], [], error)
    return Walk(kept, forced)


def _clean(walked: Walk, count: int, clean: int) -> int:
    """How many drafts of a walked request are no survivors: those that were none, and what the grammar forces at their head."""
    if clean == count:
        return len(walked.drafts)
    forced = next((i for i, is_forced in enumerate(walked.forced) if not is_forced), len(walked.forced))
    return max(min(clean, len(walked.drafts)), forced)


class GrammarStep:
    """The grammars of one step: adjusted drafts before the forward, masked logits behind it.

    Args:
        reqs: the batch's requests.
        rows: host list, rows whose grammar is walked.
        limits: host list, the draft limit of every row.
        k: drafts per request in this step.
        vocab, mask_id: sizes of the model.
    """

    def __init__(self, reqs: list, rows: list[int], limits: list[int], k: int, vocab: int, mask_id: int):
        self._reqs, self._limits, self._k, self._mask_id = reqs, limits, k, mask_id
        self._vocab = vocab
        self._rows = rows
        self._mask: torch.Tensor | None = None
        self._index: torch.Tensor | None = None

    def adjust(self, carried: Carried) -> tuple[Carried, dict[int, Exception]]:
        """Walk the grammars over the drafts, which are read back from the device.

        Returns the adjusted drafts, and the rows whose grammar failed.
        """
        device = carried.drafts.device
        live = [i for i in self._rows if not self._reqs[i].finished() and not self._reqs[i].grammar.finished]
        if not live:
            return carried, {}
        self._rows = live
        self._index = on_device(torch.tensor(live, dtype=torch.int64), device)
        mine = self._index
        packed = torch.cat([carried.counts[mine, None], carried.clean[mine, None], carried.drafts[mine]], dim=1).tolist()
        per = self._k + 1
        self._mask = self._reqs[live[0]].grammar.allocate_vocab_mask(vocab_size=self._vocab, batch_size=len(live) * per, device="cpu")
        walks = [
            walk(self._reqs[i].grammar, drafts[:count], self._limits[i], self._mask, n * per, self._mask_id, self._vocab)
            for n, (i, (count, _, *drafts)) in enumerate(zip(live, packed))
        ]
        clean = [_clean(w, *before[:2]) for w, before in zip(walks, packed)]
        failed = {i: w.failed for i, w in zip(live, walks) if w.failed is not None}
        host = torch.tensor(
            [
                [len(w.drafts), c, *w.drafts, *[0] * (self._k - len(w.drafts)), *w.forced, *[0] * (self._k - len(w.forced))]
                for w, c in zip(walks, clean)
            ],
            dtype=torch.int64,
        )
        new = on_device(host, device)
        drafts, forced = new[:, 2 : self._k + 2], new[:, self._k + 2 :].bool()
        return (
            Carried(
                drafts=carried.drafts.index_copy(0, self._index, drafts),
                counts=carried.counts.index_copy(0, self._index, new[:, 0].to(carried.counts.dtype)),
                log_q=carried.log_q.index_copy(0, self._index, carried.log_q[self._index].masked_fill(forced, 0.0)),
                q=carried.q,
                clean=carried.clean.index_copy(0, self._index, new[:, 1].to(carried.clean.dtype)),
                # What the walk left is verified: it has ended where the grammar ends, or forbids a draft.
                sure=None if carried.sure is None else carried.sure.index_fill(0, self._index, 0.0),
            ),
            failed,
        )

    def apply(self, logits: torch.Tensor) -> None:
        """Mask the verifying rows of ``logits`` ``(B, W, V)`` in place."""
        if self._mask is None:
            return
        grammar = self._reqs[self._rows[0]].grammar
        per = self._k + 1
        rows = logits[self._index, :per].reshape(-1, logits.shape[-1])
        grammar.apply_vocab_mask(logits=rows, vocab_mask=grammar.move_vocab_mask(self._mask, logits.device))
        logits[self._index, :per] = rows.view(-1, per, logits.shape[-1])
