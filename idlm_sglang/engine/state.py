"""Per-slot ISD state on the device, indexed by SGLang's request slot (``req_pool_idx``)."""

from dataclasses import dataclass

import torch

from idlm_sglang.isd.propose import Proposal
from idlm_sglang.isd.tables import StepTables

# Columns of the table in front of the drafts: their count, how many are no survivors, request number, length.
_DRAFTS = 4


@dataclass(frozen=True)
class Carried:
    """Drafts a batch brings into a step: ``drafts (B, K)``, ``counts (B,)``, ``log_q (B, K)``, ``q (B, K, V)`` or None, ``clean (B,)``.

    The first ``clean`` drafts are no survivors of a rejection. ``sure (B, K)``: :class:`~idlm_sglang.isd.propose.Proposal`'s, or None.
    """

    drafts: torch.Tensor
    counts: torch.Tensor
    log_q: torch.Tensor
    q: torch.Tensor | None
    clean: torch.Tensor
    sure: torch.Tensor | None = None


class SlotState:
    """Drafts per slot, valid only for the request and the length they were drawn for.

    Both are stored beside the drafts and compared on the device, so a slot that was retracted, reused, or moved on by
    an extend or a mixed forward takes a cold step by itself; extends clear their slots as well.

    Args:
        slots: rows of SGLang's request table (row 0 is its padding row).
        drafts: K at the largest stride.
        vocab: V, for the stored distributions.
        keep_q: allocate q (``slots x K x V`` float32); needed by the rejection rule.
    """

    def __init__(self, slots: int, drafts: int, vocab: int, keep_q: bool, device):
        # One table, so that a step reads and writes it in one operation each; the names are views of its columns.
        self._table = torch.zeros(slots, _DRAFTS + drafts, dtype=torch.int64, device=device)
        self.counts, self.clean_counts, self.numbers, self.lengths = self._table[:, :_DRAFTS].unbind(1)
        self.lengths.fill_(-1)
        self.drafts = self._table[:, _DRAFTS:]
        self.log_q = torch.zeros(slots, drafts, dtype=torch.float32, device=device)
        self.sure = torch.zeros(slots, drafts, dtype=torch.float32, device=device)
        self.q = torch.zeros(slots, drafts, vocab, dtype=torch.float32, device=device) if keep_q else None
        self._tables: dict[int, StepTables] = {}

    @staticmethod
    def q_bytes(slots: int, drafts: int, vocab: int) -> int:
        """Memory of q in bytes."""
        return slots * drafts * vocab * 4

    def tables(self, k: int) -> StepTables:
        """Those of steps with K = ``k`` drafts, made when first asked for."""
        if k not in self._tables:
            self._tables[k] = StepTables(k, self.log_q.device)
        return self._tables[k]

    def clear(self, slots: torch.Tensor) -> None:
        """Forget the drafts of ``slots`` ``(B,)``."""
        self.counts[slots] = 0

    def load(self, slots: torch.Tensor, numbers: torch.Tensor, seq_lens: torch.Tensor, limits: torch.Tensor, k: int, with_q: bool, with_sure: bool = False) -> Carried:
        """The valid drafts of a batch, truncated to each request's limit and to the step's K.

        Args:
            slots, numbers, seq_lens, limits: ``(B,)`` integer.
            k: drafts per request in this step (host).
            with_q: whether q is read; with_sure: whether it is asked how sure the drafts are.
        """
        kept = self._table.index_select(0, slots)
        counts, clean, owners, lengths = kept[:, :_DRAFTS].unbind(1)
        fits = (owners == numbers) & (lengths == seq_lens)
        counts = torch.where(fits, torch.minimum(counts, limits), 0).clamp(max=k)
        q = self.q[slots, :k] if with_q else None
        sure = self.sure[slots, :k] if with_sure else None
        return Carried(kept[:, _DRAFTS : _DRAFTS + k], counts, self.log_q[slots, :k], q, torch.minimum(clean, counts), sure)

    def store(self, slots: torch.Tensor, numbers: torch.Tensor, seq_lens: torch.Tensor, proposal: Proposal) -> None:
        """Keep a step's proposal for the request ``numbers`` at its new length ``seq_lens`` (both ``(B,)``)."""
        k = proposal.drafts.shape[1]
        head = torch.stack([proposal.counts, proposal.clean, numbers, seq_lens.to(torch.int64)], dim=1)
        self._table[slots, : _DRAFTS + k] = torch.cat([head, proposal.drafts], dim=1)
        self.log_q[slots, :k] = proposal.log_q
        if proposal.sure is not None:
            self.sure[slots, :k] = proposal.sure
        if proposal.q is not None:
            self.q[slots, :k] = proposal.q
