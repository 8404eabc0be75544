"""Tensor-parallel ranks take tokens and drafts from the first of them.

Each rank has the same logits and the same noise, so that each finds the same ones. Where one rank's library rounds another way, ranks that went on
with their own would feed different rows into one sharded forward: wrong answers, and lengths that no longer fit. One small
broadcast on the device a strided step, and one behind a prompt, rules that out. What SGLang's sampler draws (a prompt's token, stride 1) it
brings together itself, where ``SYNC_TOKEN_IDS_ACROSS_TP`` says so: under ISD it does (``engine.algorithm``).
"""

from dataclasses import replace

import torch

from idlm_sglang.isd import StepOutcome
from idlm_sglang.isd.propose import Proposal


class Ranks:
    """``group``: SGLang's tensor-parallel group, or None for one rank."""

    def __init__(self, group=None):
        self._group = group if group is not None and group.world_size > 1 else None

    def step(self, step: StepOutcome) -> StepOutcome:
        """The first rank's tokens, lengths and next drafts. Distributions and figures stay each rank's own: what is decided by them is decided by the first."""
        if self._group is None:
            return step
        tokens, lens, deciding, drafts, counts, clean = self._first(
            step.tokens, step.accept_lens, step.deciding, step.proposal.drafts, step.proposal.counts, step.proposal.clean
        )
        last = tokens.gather(1, (lens - 1)[:, None].to(torch.int64)).squeeze(1)
        proposal = replace(step.proposal, drafts=drafts, counts=counts, clean=clean)
        return replace(step, tokens=tokens, accept_lens=lens, last=last, deciding=deciding, proposal=proposal)

    def drafts(self, proposal: Proposal) -> Proposal:
        """The first rank's drafts."""
        if self._group is None:
            return proposal
        drafts, counts, clean = self._first(proposal.drafts, proposal.counts, proposal.clean)
        return replace(proposal, drafts=drafts, counts=counts, clean=clean)

    def _first(self, *values: torch.Tensor) -> list[torch.Tensor]:
        """Integers ``(B,)`` or ``(B, ..)`` in one broadcast."""
        columns = [value.view(len(value), -1).to(torch.int64) for value in values]
        shared = self._group.broadcast(torch.cat(columns, dim=1), src=0)
        parts = shared.split([column.shape[1] for column in columns], dim=1)
        return [part.reshape(value.shape).to(value.dtype).contiguous() for part, value in zip(parts, values)]
