"""Everything between logits and tokens: choose, truncate, verify, store_q.

Launches of a step: 2 for greedy and coupled requests without truncation, plus 1 for verification; 3 more where some request truncates; 2 more where some
request uses the rejection rule. No value is asked of the device.
"""

import torch

from idlm_kernels.choose import Draws, choose
from idlm_kernels.rows import Rows, Sampling
from idlm_kernels.store_q import store_q
from idlm_kernels.truncate import truncate
from idlm_kernels.verify import Verified, verify


def draw(rows: Rows, sampling: Sampling) -> Draws:
    """A token of every row that is read, from the requests' own distributions."""
    return truncate(rows, sampling, choose(rows, sampling))


def first_drafts(rows: Rows, sampling: Sampling, q: torch.Tensor | None = None, slots: torch.Tensor | None = None) -> Draws:
    """Drafts of MASK rows behind a prompt; `idlm_sglang.isd.step.first_proposal` is the same in plain torch.

    Args:
        rows: K columns, all read. q, slots: as for :func:`isd_step`, written only.
    """
    draws = draw(rows, sampling)
    if sampling.any_rejection and q is not None:
        columns = torch.arange(rows.index.shape[1], dtype=torch.int32, device=rows.index.device)
        store_q(rows, sampling, draws, columns.expand(rows.index.shape).contiguous(), q, slots)
    return draws


def isd_step(
    rows: Rows,
    sampling: Sampling,
    drafts: torch.Tensor,
    counts: torch.Tensor,
    log_q: torch.Tensor,
    limits: torch.Tensor,
    q: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    forks: torch.Tensor | None = None,
    salvage: bool = False,
) -> tuple[Verified, Draws]:
    """One step behind the forward pass; `idlm_sglang.isd.step.isd_step` is the same in plain torch.

    Args:
        rows: ``2K + 1`` columns, by :func:`idlm_kernels.slots.load` or :func:`idlm_kernels.rows.step_rows`.
        drafts: ``(B, K)`` int64; counts: ``(B,)`` int64; log_q: ``(B, K)`` float32: what was carried into the step.
        limits: ``(B,)`` integer, the most drafts each request may carry next.
        q: ``(S, K', V)`` float32, the slots' distributions, read for this step's drafts and overwritten with the next ones'; needed where a
            request uses the rejection rule. slots: ``(B,)`` int64, each request's row of q.
        forks, salvage: as for `idlm_sglang.isd.step.isd_step`.
    """
    draws = draw(rows, sampling)
    verified = verify(rows, sampling, draws, drafts, counts, log_q, limits, q, slots, forks, salvage)
    if sampling.any_rejection and q is not None:
        store_q(rows, sampling, draws, verified.columns, q, slots)
    return verified, draws
