"""Strided steps whose requests bring different numbers of rows (ragged verify), on a CPU.

What a row is worth is only known from the drafts (`isd.trim`). On a CPU they are at hand, and the forward takes any number of
rows. On a GPU they would have to be waited for, and a captured forward's rows are as many as its graph's: there every request has all of its
2N - 1 rows.
"""

import logging
from dataclasses import dataclass, replace

import torch
from sglang.srt.speculative.ragged_verify import RaggedVerifyLayout

from idlm_sglang.config import AUTO, OFF, ON, TORCH, SettingError
from idlm_sglang.engine.requests import BatchRows
from idlm_sglang.engine.state import Carried
from idlm_sglang.isd.trim import Rows, trim
from idlm_sglang.platform import accelerator_available
from idlm_sglang.platform.cpu import ATTENTION_BACKEND

logger = logging.getLogger(__name__)


def resolve_ragged(asked: str, backend: str | None, graphs: str, step_ops: str, ranks: int) -> str:
    """Whether rows are trimmed, ``on`` or ``off``.

    Args:
        asked: ``IDLM_RAGGED_VERIFY``. backend: the attention backend. graphs, step_ops: resolved settings. ranks: of tensor parallelism; each would
            come to its own rows, and sums that differ in a last bit to others.

    Raises:
        SettingError: ``on`` where a step has a fixed width.
    """
    fits = not accelerator_available() and backend == ATTENTION_BACKEND and graphs == OFF and step_ops == TORCH and ranks == 1
    if asked == ON and not fits:
        allowed = f"{AUTO}, {OFF}, or a CPU with --attention-backend {ATTENTION_BACKEND}, --tp-size 1, IDLM_DECODE_GRAPHS={OFF} and IDLM_STEP_OPS={TORCH}"
        raise SettingError(f"IDLM_RAGGED_VERIFY={ON} cannot be served here, where a step has a fixed width; allowed: {allowed}")
    return ON if fits and asked != OFF else OFF


def trimmed(carried: Carried, rows: BatchRows, lengths: list[int], salvage: str) -> tuple[Carried, list[Rows]]:
    """The drafts of a step without those that are not worth a row, and each request's rows.

    Args:
        carried: with ``sure``, behind the walks over grammars. lengths: host list, tokens with KV of each request.
    """
    drafts, sure = carried.drafts.tolist(), carried.sure.tolist()
    heads = zip(carried.counts.tolist(), carried.clean.tolist(), rows.ends, lengths, rows.stops, rows.limits_host, rows.records)
    found = [
        trim(drafts[i][:count], clean, sure[i], stops, end - length - 1, limit, salvage, record.stands)
        for i, (count, clean, end, length, stops, limit, record) in enumerate(heads)
    ]
    counts = torch.tensor([one.drafts for one in found], dtype=torch.int64)
    return replace(carried, counts=counts, clean=torch.minimum(carried.clean, counts)), found


@dataclass(frozen=True)
class RaggedRows:
    """The rows of a step that are computed, of W = 2K + 1 for each of B requests.

    Attributes:
        lens: rows of each request, the first of its W.
        live: ``(R,)`` int64, R the sum of ``lens``: where they are among the B W rows.
    """

    lens: list[int]
    live: torch.Tensor

    @classmethod
    def of(cls, counts: torch.Tensor, masks: torch.Tensor, width: int) -> "RaggedRows | None":
        """``counts`` drafts and ``masks`` MASK rows of each request, both ``(B,)`` int64; None where that is all W rows of all of them."""
        rows = counts + masks + 1
        lens = rows.tolist()
        if min(lens) == width:
            return None
        return cls(lens, (torch.arange(width) < rows[:, None]).view(-1).nonzero().view(-1))

    def pick(self, values: torch.Tensor) -> torch.Tensor:
        """``(B, W)`` to ``(R,)``."""
        return values.view(-1).index_select(0, self.live)

    def spread(self, values: torch.Tensor, width: int) -> torch.Tensor:
        """``(R, V)`` to ``(B, W, V)``, zeros where no row was computed."""
        whole = values.new_zeros(len(self.lens) * width, values.shape[1])
        return whole.index_copy_(0, self.live, values).view(len(self.lens), width, -1)

    def places(self, rows: torch.Tensor) -> torch.Tensor:
        """Row numbers ``(n,)`` among the B W rows as row numbers of the forward; those that are not computed are left out."""
        at = torch.searchsorted(self.live, rows).clamp(max=len(self.live) - 1)
        return at[self.live[at] == rows]

    def layout(self) -> RaggedVerifyLayout:
        """SGLang's own description of such a forward."""
        lens = torch.tensor(self.lens, dtype=torch.int32)
        ends = torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
        total = len(self.live)
        return RaggedVerifyLayout(
            verify_lens=lens, graph_num_tokens=total, extend_start_loc=ends[:-1], qo_indptr_device=ends, verify_lens_cpu=self.lens, total_verify_tokens=total
        )
