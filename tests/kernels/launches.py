"""Every launch of the package at the size it is meant for: 64 requests, stride 4, the vocabulary of Qwen3."""

from types import SimpleNamespace

import torch

from idlm_kernels import masks, noise, slots
from idlm_kernels.rows import Rows
from idlm_kernels.step import isd_step


def launch_all(device: str, dtype: torch.dtype, terms: bool, batch: int = 64, k: int = 3, vocab: int = 151_936) -> None:
    """All kernels once per set of rules: no request truncates or rejects, some do. On a CPU nothing may be read: the inputs hold no memory."""
    width = 2 * k + 1
    empty = lambda *shape, dtype=torch.int64: torch.empty(shape, dtype=dtype, device=device)
    state = SimpleNamespace(
        drafts=empty(batch + 1, k), counts=empty(batch + 1), clean_counts=empty(batch + 1), log_q=empty(batch + 1, k, dtype=torch.float32), numbers=empty(batch + 1), lengths=empty(batch + 1)
    )
    ids = empty(batch)
    inputs = slots.load(state, ids, ids, ids, ids, ids, k, empty(batch + 1, 4096, dtype=torch.int32), 3, 4095)
    logits = empty(batch, width, vocab, dtype=dtype)
    bias = empty(batch, vocab, dtype=torch.float32) if terms else None
    bitmask = empty(batch, width, (vocab + 31) // 32, dtype=torch.int32) if terms else None
    rows = Rows(logits, inputs.index, inputs.positions, bias, bitmask)
    for truncated, rejection in ((False, False), (True, True)):
        f32 = dict(dtype=torch.float32)
        sampling = SimpleNamespace(
            temperature=empty(batch, **f32), top_k=empty(batch, dtype=torch.int32), top_p=empty(batch, **f32), min_p=empty(batch, **f32),
            seed=ids, coupled=empty(batch, dtype=torch.bool), any_truncated=truncated, any_rejection=rejection,
        )  # fmt: skip
        q = empty(batch + 1, k, vocab, **f32) if rejection else None
        verified, _ = isd_step(rows, sampling, inputs.drafts, inputs.counts, inputs.log_q, ids, q, ids, inputs.forks, truncated)
    kept = verified.drafts, verified.counts, verified.clean, verified.log_q
    slots.store(state, ids, ids, ids, *kept)
    slots.store(state, ids, ids, ids, *kept, slots.Round(inputs.counts, inputs.clean, verified.accept_lens, verified.introspection))
    masks.hide(empty(batch * width * 4096, dtype=torch.uint8), inputs.counts, inputs.forks, ids, width)
    noise.gumbel(ids[:1], inputs.positions[:1], vocab)
