"""Prefill and stride 1: `engine.sampler.TokenKeyedSampler`, one row per request, beside SGLang's own sampler.

Seeded batches take ours; batches without a seed take SGLang's PyTorch sampler, untouched. SGLang's seeded path (Triton hash, noise by
sorted rank) refuses min-p. The reference goes row by row. `stride` is 1: the sampler sees the last row only.
"""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import torch

from benchmarks.kernels.harness import LIBRARY, OURS, REFERENCE, Arm, Case, Options
from benchmarks.kernels.inputs import BATCHES, QWEN3_VOCAB, SAMPLING, Size, embedded_vocab, peaked_logits, sampling_rows
from benchmarks.kernels.target import by_row, same_distribution
from idlm_sglang.isd import noise
from idlm_sglang.isd.target import host_flags

VARIANTS = ("temperature", "min-p", "paper")


def sampler():
    """The engine's sampler without a server around it: what it reads of one is set at start and not used here."""
    from idlm_sglang.config import TORCH
    from idlm_sglang.engine.sampler import TokenKeyedSampler
    from idlm_sglang.engine.step_ops import step_ops

    made = TokenKeyedSampler.__new__(TokenKeyedSampler)
    torch.nn.Module.__init__(made)
    made._ops = step_ops(TORCH)
    return made


def sampling_info(variant: str, rows) -> SimpleNamespace:
    """What SGLang's ``SamplingBatchInfo`` says of such a batch."""
    _, top_k, top_p, min_p = SAMPLING[variant]
    return SimpleNamespace(
        temperatures=rows.temperature[:, None],
        top_ks=rows.top_k,
        top_ps=rows.top_p,
        min_ps=rows.min_p,
        idlm_seeds=rows.seed,
        idlm_flags=host_flags([(top_k, top_p, min_p)] * len(rows.seed)),
        is_all_greedy=False,
        need_top_k_sampling=top_k < 1 << 30,
        need_top_p_sampling=top_p < 1,
        need_min_p_sampling=min_p > 0,
        has_custom_logit_processor=False,
        sampling_mask_batch_indices=None,
    )


def arms_of(size: Size, variant: str, options: Options) -> list[Arm]:
    rows = sampling_rows(variant, size.batch, options.device)
    logits = peaked_logits((size.batch,), size.vocab, options.device)
    positions = torch.arange(size.batch, device=options.device) * 37 + 100
    info, made = sampling_info(variant, rows), sampler()

    def ours() -> torch.Tensor:
        made._preprocess_logits(logits, info)
        return made._sample_from_probs(None, info, positions, False)[0]

    def by_rows() -> torch.Tensor:
        scores = by_row(logits[:, None], rows)[:, 0]
        noisy = [s + noise.gumbel(rows.seed[i : i + 1], positions[i : i + 1, None], size.vocab)[0, 0] for i, s in enumerate(scores)]
        return torch.stack([row.argmax() for row in noisy])

    def check(got: torch.Tensor, want: torch.Tensor) -> None:
        # One token per row says little about the tail of a peaked distribution.
        same_distribution(made._ops.keep(logits.float()[:, None], made._rows_of(info, rows.seed)), by_row(logits[:, None], rows)[:, 0])
        assert int((got != want).sum()) <= len(want) // 64, f"{int((got != want).sum())} of {len(want)} tokens differ"

    def by_sglang(seed: torch.Tensor | None) -> torch.Tensor:
        from sglang.srt.layers.sampler import sampling_from_probs_torch, top_k_top_p_min_p_sampling_from_probs_torch

        probs = torch.softmax(logits / rows.temperature[:, None], dim=-1)
        if not rows.any_truncated:
            return sampling_from_probs_torch(probs, seed, positions)
        largest = min(SAMPLING[variant][1], size.vocab)
        need_min_p = SAMPLING[variant][3] > 0
        return top_k_top_p_min_p_sampling_from_probs_torch(
            probs, rows.top_k, rows.top_p, rows.min_p, need_min_p, seed, positions, max_top_k=largest
        )

    def check_draw(got: torch.Tensor, want: torch.Tensor) -> None:
        scores = by_row(logits[:, None], rows)[:, 0]
        outside = (~torch.isfinite(scores.gather(-1, got.long()[:, None]))).sum()
        assert int(outside) <= len(got) // 64, f"{int(outside)} tokens outside the support"

    by_rank = Arm("SGLang, seeded", LIBRARY, lambda: by_sglang(rows.seed), check_draw, needs_gpu=True, note="keyed by rank under truncation")
    return [
        Arm("ours", OURS, ours, check),
        Arm("loop over rows", REFERENCE, by_rows),
        Arm("SGLang, unseeded", LIBRARY, lambda: by_sglang(None), check_draw, note="no key"),
        by_rank,
    ]


def cases(options: Options) -> Iterator[Case]:
    vocabularies = (embedded_vocab(),) if options.quick else (embedded_vocab(), QWEN3_VOCAB)
    for vocab in vocabularies:
        for batch in (1, 8) if options.quick else BATCHES:
            for variant in VARIANTS:
                size = Size(vocab, batch, 1)
                yield Case(variant, size.dims(), partial(arms_of, size, variant, options), size.cells)
