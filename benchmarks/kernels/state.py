"""What a step reads and writes besides logits: its rows (`isd.layout`), and the drafts kept per slot (`engine.state.SlotState`).

No library has these; the reference is a loop over the requests. "load and store, q" keeps the drafts' distributions too, as the rejection
rule needs.
"""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.kernels.harness import KERNEL, OURS, REFERENCE, Arm, Case, Options, assert_equal
from benchmarks.kernels.inputs import MASK, Size, sizes
from idlm_sglang.isd.propose import Proposal
from idlm_sglang.isd.tables import StepTables


def layout_arms(size: Size, options: Options) -> list[Arm]:
    device, k, width = options.device, size.k, size.width
    tables = StepTables(k, device)
    pending = torch.randint(4, size.vocab, (size.batch,), device=device)
    drafts = torch.randint(4, size.vocab, (size.batch, k), device=device)
    counts = torch.arange(size.batch, device=device) % (k + 1)
    seq_lens = torch.arange(size.batch, device=device) * 37 + 100

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        tokens, offsets = tables.laid_out(pending, drafts, tables.pair(counts, counts), MASK)
        return tokens, seq_lens[:, None] + offsets

    def in_loops() -> tuple[torch.Tensor, torch.Tensor]:
        tokens, positions = [], []
        for p, row, count, length in zip(pending.tolist(), drafts.tolist(), counts.tolist(), seq_lens.tolist()):
            tokens.append(([p, *row[:count]] + [MASK] * width)[:width])
            positions.append(list(range(length, length + width)))
        return torch.tensor(tokens, device=device), torch.tensor(positions, device=device)

    return [
        Arm("ours", OURS, ours),
        Arm("loop over requests", REFERENCE, in_loops),
    ]


def slots_arms(size: Size, with_q: bool, options: Options) -> list[Arm]:
    from idlm_sglang.engine.state import SlotState

    device, k, batch = options.device, size.k, size.batch
    slots = torch.randperm(batch, device=device) + 1
    numbers, limits = torch.arange(batch, device=device) + 7, torch.full((batch,), k, device=device)
    seq_lens = torch.arange(batch, device=device) * 37 + 100
    counts = torch.arange(batch, device=device) % (k + 1)
    drafts, log_q = torch.randint(4, size.vocab, (batch, k), device=device), torch.randn(batch, k, device=device)
    q = torch.rand(batch, k, size.vocab, device=device) if with_q else None
    proposal = Proposal(drafts, counts, log_q, q, counts)
    state = SlotState(batch + 1, k, size.vocab, with_q, device)
    kept: dict[int, tuple] = {}

    def ours():
        state.store(slots, numbers, seq_lens, proposal)
        found = state.load(slots, numbers, seq_lens, limits, k, with_q)
        return (found.drafts, found.counts, found.log_q) + ((found.q,) if with_q else ())

    def in_loops():
        for b, slot in enumerate(slots.tolist()):
            kept[slot] = (int(numbers[b]), int(seq_lens[b]), int(counts[b]), drafts[b].clone(), log_q[b].clone(), q[b].clone() if with_q else None)
        rows = [kept[slot] for slot in slots.tolist()]
        found = [r[2] if (r[0], r[1]) == (int(numbers[b]), int(seq_lens[b])) else 0 for b, r in enumerate(rows)]
        out = (torch.stack([r[3] for r in rows]), torch.tensor(found, device=device), torch.stack([r[4] for r in rows]))
        return out + ((torch.stack([r[5] for r in rows]),) if with_q else ())

    def by_kernels():
        from idlm_kernels import slots as kernels

        kernels.store(state, slots, numbers, seq_lens, drafts, counts, counts, log_q)
        found = kernels.load(state, slots, numbers, seq_lens, limits, numbers, k, table, MASK, 1 << 20)
        return found.drafts, found.counts, found.log_q

    arms = [Arm("ours", OURS, ours), Arm("loop over requests", REFERENCE, in_loops)]
    if not with_q:
        table = torch.zeros(batch + 1, 4096, dtype=torch.int32, device=device)
        arms.append(Arm("Triton", KERNEL, by_kernels, needs_gpu=True, note="layout, positions and KV slots included"))
    return arms


def cases(options: Options) -> Iterator[Case]:
    for size in sizes(options):
        yield Case("layout", size.dims(), partial(layout_arms, size, options))
        yield Case("load and store", size.dims(), partial(slots_arms, size, False, options))
        yield Case("load and store, q", size.dims(), partial(slots_arms, size, True, options), size.batch * size.k * size.vocab)
