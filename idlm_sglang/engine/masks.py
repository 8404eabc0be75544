"""Branch rounds on SGLang's Triton attention: hidden columns as the custom mask of a TARGET_VERIFY forward.

For row i of request b and new column j the kernel reads the byte at

    start_b + i * (L_b + W) + L_b + j,        start_b = W * sum over a < b of (L_a + W),

L being the committed columns and W the step's rows: a mask over the whole text, of which it skips the prefix. So the W x W corner of each
request is all that is written, into a buffer that is kept; what lies between is never read. The lengths stay on the device, and may be ahead of
what the host knows. The buffer is sized by the columns that have KV slots, which the host does know and no step goes beyond.
"""

from collections.abc import Callable

import torch

from idlm_sglang.config import SettingError
from idlm_sglang.isd.layout import visible_rows

# A buffer that is too small is replaced by one with so much more room.
_GROWTH = 1.25


def check(backend) -> bool:
    """Whether branch rounds need a mask: not where the attention reads ``IsdVerifyInput.new_visible``.

    Raises:
        SettingError: the attention backend can hide no columns.
    """
    if getattr(backend, "hides_new_columns", False):
        return False
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    # The verify kernels for AMD's gfx95 read no mask; the one of deterministic inference reads the prefix's part, which is not written.
    chains_only = any(getattr(backend, name, False) for name in ("use_verify_splitkv", "use_verify_shared_kv", "enable_deterministic"))
    if not isinstance(backend, TritonAttnBackend) or chains_only:
        raise SettingError(f"IDLM_SALVAGE=branch cannot be served with the attention of {type(backend).__name__}; allowed: chain, off")
    return True


def note_columns(batch) -> None:
    """Keep on ``batch``, whose slots have just been allocated, how many KV columns a step of it has at most, its own rows included: those with slots.

    Not to be asked later. A request that ends by the result before is still in the step, and has given its slots back where SGLang waits for
    that result: with a grammar in the batch.
    """
    batch.idlm_columns = sum(req.kv.kv_allocated_len for req in batch.reqs)


def hide(buffer: torch.Tensor, counts: torch.Tensor, forks: torch.Tensor, lengths: torch.Tensor, width: int) -> None:
    """Write the W x W corner of each request's mask into ``buffer`` ``(bytes,)`` uint8, in plain torch.

    Args:
        counts, forks: ``(B,)`` integer, drafts of a step, and those that its MASK rows see (``isd.layout``).
        lengths: ``(B,)`` integer, L.
        width: W.
    """
    lengths = lengths.to(torch.int64)
    rows = lengths + width
    start = width * (rows.cumsum(0) - rows) + lengths
    new = torch.arange(width, device=lengths.device)
    index = start[:, None, None] + new[:, None] * rows[:, None, None] + new
    buffer.scatter_(0, index.view(-1), visible_rows(counts, forks, width).tril().to(torch.uint8).view(-1))


class BranchMask:
    """The masks of one step after the other, in one buffer.

    Args:
        hide: what writes them, :func:`hide` or a kernel in its place.

    Attributes:
        captured: another buffer, which graphs read: its address does not change. What does not fit is for eager forwards.
    """

    def __init__(self, device, hide: Callable = hide):
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._hide = hide
        self.captured: torch.Tensor | None = None
        self._fits = 0

    def reserve(self, size: int, padding: int) -> None:
        """Make the buffer of graphs: ``size`` bytes for masks, ``padding`` for what the kernel reads behind them for padding requests."""
        self.captured = torch.zeros(size + padding, dtype=torch.uint8, device=self._buffer.device)
        self._fits = size

    def is_captured(self, mask: torch.Tensor | None) -> bool:
        """Whether a mask that was written is where graphs read it."""
        return mask is not None and mask is self.captured

    def write(self, counts: torch.Tensor, forks: torch.Tensor, lengths: torch.Tensor, width: int, columns: int) -> torch.Tensor:
        """The mask of a step: ``(bytes,)`` uint8, 1 where a row sees a column.

        Args:
            counts, forks, lengths, width: as in :func:`hide`.
            columns: on the host, at least the sum of L + W.
        """
        buffer = self._of(width * columns)
        self._hide(buffer, counts, forks, lengths, width)
        return buffer

    def _of(self, size: int) -> torch.Tensor:
        if size <= self._fits:
            return self.captured
        if len(self._buffer) < size:
            self._buffer = self._buffer.new_empty(int(size * _GROWTH))
        return self._buffer
