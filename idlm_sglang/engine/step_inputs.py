"""What a strided step brings into its forward, made of what its requests' slots keep."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from idlm_sglang.engine.state import Carried, SlotState
from idlm_sglang.isd.layout import forks


@dataclass(slots=True)
class Requests:
    """B requests, where their drafts are kept, and under which stamp.

    Attributes:
        state: the slots.
        slots: ``(B,)`` int64; numbers: ``(B,)`` int64 request numbers; seq_lens: ``(B,)`` integer, tokens with KV.
        limits: ``(B,)`` int64, the most drafts that each may carry.
    """

    state: SlotState
    slots: torch.Tensor
    numbers: torch.Tensor
    seq_lens: torch.Tensor
    limits: torch.Tensor


@dataclass(slots=True)
class Layout:
    """How the rows of a step are made.

    Attributes:
        k: K, the most drafts of a request in this step; W = 2K + 1.
        salvage: ``branch``, ``chain`` or ``off``.
        pending: ``(B,)`` int64, the last committed token of each request.
        table: ``(slots, columns)`` integer, SGLang's page table; it has columns for all W rows.
        mask_id: the MASK token id. last_position: of the rotary table, which ends with the context.
        ragged: rows may be trimmed, by how sure the drafts are.
    """

    k: int
    salvage: str
    pending: torch.Tensor
    table: torch.Tensor
    mask_id: int
    last_position: int
    ragged: bool = False


@dataclass(slots=True)
class StepInputs:
    """The rows of one step, W = 2K + 1 per request.

    Attributes:
        carried: the drafts that are verified.
        forks: ``(B,)`` integer, how many of them the MASK rows see.
        tokens: ``(B, W)`` int64 input ids. positions: ``(B, W)`` int64, not behind the last of the rotary table. places: ``(B, W)`` int64 KV slots.
        read: which rows of logits are read, and the positions that key their noise, both ``(B, W)`` int64; None where `isd.isd_step` finds them.
        masks: ``(B,)`` int64, MASK rows of each request where its rows were trimmed (`isd.trim`); None: K.
    """

    carried: Carried
    forks: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    read: tuple[torch.Tensor, torch.Tensor] | None = None
    masks: torch.Tensor | None = None


# From the drafts that the slots keep to those that are laid out.
Adjust = Callable[[Carried], Carried]


def load(requests: Requests, layout: Layout, with_q: bool, adjust: Adjust | None) -> StepInputs:
    """The inputs of a step in plain torch. ``with_q``: the drafts' distributions are read."""
    tables = requests.state.tables(layout.k)
    carried = requests.state.load(requests.slots, requests.numbers, requests.seq_lens, requests.limits, layout.k, with_q, layout.ragged)
    if adjust is not None:
        carried = adjust(carried)
    seen = forks(carried.clean, carried.counts, layout.salvage)
    tokens, offsets = tables.laid_out(layout.pending, carried.drafts, tables.pair(carried.counts, seen), layout.mask_id)
    committed = requests.seq_lens.to(torch.int64)[:, None]
    return StepInputs(
        carried,
        seen,
        tokens,
        (committed + offsets).clamp(max=layout.last_position),
        layout.table[requests.slots[:, None], committed + tables.column].to(torch.int64),
    )
