"""A token of every row that a step reads: temperature, filters, keyed noise and argmax (`idlm_kernels.choose` and `.truncate`).

`ours` is plain torch, as the CPU runs it. The Triton kernels read the logits once, twice where a request truncates; `Triton, S splits` tells which number of
programs per row a batch wants (`idlm_kernels.choose.splits_for`). "argmax" is the time to read the logits once. FlashInfer's samplers
have no keyed noise and know no ties; its top-k and top-p come from logits, min-p from probabilities.
"""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.kernels.harness import FLOOR, KERNEL, LIBRARY, OURS, REFERENCE, Arm, Case, Options
from benchmarks.kernels.inputs import Size, Step, sizes, step_of
from benchmarks.kernels.target import by_row
from benchmarks.kernels.verify import kernel_rows
from idlm_sglang.isd import noise, step_positions, target_scores

VARIANTS = ("greedy", "temperature", "top-p", "min-p", "paper")


def noisy(scores: torch.Tensor, step: Step) -> torch.Tensor:
    if not step.rows.any_sampled:
        return scores
    return scores + noise.gumbel(step.rows.seed, step_positions(step.seq_lens, scores.shape[1]), scores.shape[-1])


def by_kernel(step: Step, splits: int | None = None) -> torch.Tensor:
    from idlm_kernels.choose import choose
    from idlm_kernels.truncate import truncate

    rows = kernel_rows(step)
    return truncate(rows, step.rows, choose(rows, step.rows, splits), splits).tokens


def by_flashinfer(step: Step, variant: str) -> torch.Tensor:
    from flashinfer import sampling

    batch, width, vocab = step.logits.shape
    logits = step.logits.float().view(-1, vocab) / step.rows.temperature.repeat_interleave(width)[:, None]
    top_k, top_p, min_p = (part.repeat_interleave(width) for part in (step.rows.top_k, step.rows.top_p, step.rows.min_p))
    if variant == "temperature":
        tokens = sampling.sampling_from_logits(logits)
    elif variant == "min-p":
        tokens = sampling.min_p_sampling_from_probs(torch.softmax(logits, -1), min_p)
    elif variant == "top-p":
        tokens = sampling.top_p_sampling_from_probs(torch.softmax(logits, -1), top_p)
    else:
        tokens = sampling.top_k_top_p_sampling_from_logits(logits, top_k, top_p, filter_apply_order="joint")
    return tokens.view(batch, width).long()


def few_differ(got: torch.Tensor, want: torch.Tensor) -> None:
    """A draw may lie on the edge of a support that rounds another way."""
    assert int((got != want).sum()) <= 1 + got.numel() // 256, f"{int((got != want).sum())} of {got.numel()} tokens differ"


def arms_of(size: Size, variant: str, dtype: torch.dtype, options: Options) -> list[Arm]:
    step = step_of(size, variant, options.device)
    logits = step.logits.to(dtype)
    step = Step(**(vars(step) | {"logits": logits}))

    def any_draw(got: torch.Tensor, want: torch.Tensor) -> None:
        inside = torch.isfinite(by_row(logits, step.rows).gather(-1, got[..., None]))
        assert int((~inside).sum()) <= 1 + got.numel() // 256, "tokens outside the support"

    arms = [
        Arm("ours", OURS, lambda: noisy(target_scores(logits.float(), step.rows), step).argmax(-1), few_differ),
        Arm("loop over rows", REFERENCE, lambda: noisy(by_row(logits, step.rows), step).argmax(-1)),
        Arm("argmax", FLOOR, lambda: logits.argmax(-1)),
        Arm("Triton", KERNEL, lambda: by_kernel(step), few_differ, needs_gpu=True),
    ]
    if variant in ("greedy", "temperature", "paper"):
        for splits in (1, 2, 4, 8, 16):
            arms.append(Arm(f"Triton, {splits} splits", KERNEL, partial(by_kernel, step, splits), few_differ, needs_gpu=True))
    if variant != "greedy":
        arms.append(Arm("flashinfer", LIBRARY, lambda: by_flashinfer(step, variant), any_draw, needs_gpu=True, note="no key, no tie rule"))
    return arms


def cases(options: Options) -> Iterator[Case]:
    for size in sizes(options):
        for variant in VARIANTS:
            for dtype in (torch.float32,) if options.quick else (torch.float32, torch.bfloat16):
                yield Case(variant, size.dims(dtype), partial(arms_of, size, variant, dtype, options), size.cells)
