"""Everything behind the forward pass: `isd.isd_step`, logits in, committed tokens and next drafts out.

The reference goes request by request and draft by draft. "SGLang, sampled chain" is what one builds from SGLang's parts without the
noise's key: its PyTorch sampler draws a token for every one of the W rows, a draft stands while it equals its row's token, and the MASK rows'
tokens are the next drafts. It emits the same distribution as the coupled rule, but accepts less (its draws are not coupled to the drafts'), it
is not the same text at another stride, and it keeps no log q. "argmax" is the least any greedy step must do. bf16 logits are cast first.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.kernels.harness import FLOOR, KERNEL, LIBRARY, OURS, REFERENCE, Arm, Case, Options
from benchmarks.kernels.inputs import SAMPLING, Size, Step, sizes, step_of
from benchmarks.kernels.target import by_row
from benchmarks.kernels.verify import COUPLED, GREEDY, REJECTION, Chain, in_loops, kernel_rows, sglang_rejection
from idlm_sglang.isd import isd_step, noise, step_positions
from idlm_sglang.isd.verify import leading

# Name, sampling, rule, logits.
VARIANTS = (
    ("greedy", "greedy", GREEDY, torch.float32),
    ("coupled", "temperature", COUPLED, torch.float32),
    ("coupled, paper", "paper", COUPLED, torch.float32),
    ("coupled, paper", "paper", COUPLED, torch.bfloat16),
    ("rejection", "temperature", REJECTION, torch.float32),
    ("rejection, paper", "paper", REJECTION, torch.float32),
)


def by_request(rule: str, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(accept lengths, last tokens, next drafts) in loops."""
    n = step.drafts.shape[1] + 1
    scores = by_row(step.logits, step.rows)
    run, last = in_loops(rule, step, scores[:, :n])
    mask_rows = scores[:, n:]
    if rule != GREEDY:
        mask_rows = mask_rows + noise.gumbel(step.rows.seed, step_positions(step.seq_lens + n, n - 1), scores.shape[-1])
    return run + 1, last, mask_rows.argmax(-1)


def ours(step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = isd_step(step.logits.float(), *step.arguments[1:], tables=step.tables)
    return out.accept_lens.long(), out.last, out.proposal.drafts


def by_kernels(step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`idlm_kernels.step`: the next drafts' q goes where this step's was."""
    from idlm_kernels.step import isd_step as kernel_step

    slots = torch.arange(len(step.drafts), device=step.drafts.device)
    kept = None if step.q is None else step.q.clone()
    found, _ = kernel_step(kernel_rows(step), step.rows, step.drafts, step.counts, step.log_q, step.limits, kept, slots)
    return found.accept_lens.long(), found.last, found.drafts


def check(got, want) -> None:
    """Tokens equal but for a request in a hundred, at most one: a draw may lie on the edge of a support that rounds another way."""
    differing = torch.zeros(len(want[0]), dtype=torch.bool, device=want[0].device)
    for g, w in zip(got, want):
        differing |= (g != w).view(len(w), -1).any(1)
    assert int(differing.sum()) <= len(differing) // 64, f"{int(differing.sum())} of {len(differing)} requests differ"


def sampled_chain(step: Step, variant: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SGLang's PyTorch sampler on all rows, then plain comparison."""
    from sglang.srt.layers.sampler import sampling_from_probs_torch, top_k_top_p_min_p_sampling_from_probs_torch

    rows, (batch, width, vocab) = step.rows, step.logits.shape
    probs = torch.softmax(step.logits.float() / rows.temperature[:, None, None], dim=-1).view(-1, vocab)
    if rows.any_truncated:
        top_k, top_p, min_p = (part.repeat_interleave(width) for part in (rows.top_k, rows.top_p, rows.min_p))
        largest = min(SAMPLING[variant][1], vocab)
        tokens = top_k_top_p_min_p_sampling_from_probs_torch(probs, top_k, top_p, min_p, SAMPLING[variant][3] > 0, None, None, max_top_k=largest)
    else:
        tokens = sampling_from_probs_torch(probs)
    tokens = tokens.view(batch, width).long()
    k = step.drafts.shape[1]
    run = leading(tokens[:, :k] == step.drafts)
    return run + 1, tokens.gather(1, run[:, None]).squeeze(1), tokens[:, k + 1 :]


def chain_on_gpu(step: Step, chain: Chain) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's filters, SGLang's chain kernel, FlashInfer's draw for the MASK rows."""
    from flashinfer.sampling import sampling_from_probs

    from benchmarks.kernels.target import by_flashinfer

    n = step.drafts.shape[1] + 1
    probs = by_flashinfer(step.logits, step.rows).exp()
    run, last = sglang_rejection(chain, probs[:, :n].contiguous(), step.q)
    drafts = sampling_from_probs(probs[:, n:].reshape(-1, probs.shape[-1]))
    return run + 1, last, drafts.view(len(run), -1).long()


def check_draw(step: Step):
    def check(got, want) -> None:
        lens, last, drafts = got
        n = step.drafts.shape[1] + 1
        assert int(lens.min()) >= 1 and int(lens.max()) <= n, f"accept lengths {lens.tolist()}"
        scores = by_row(step.logits, step.rows)
        behind = scores.gather(1, (lens - 1)[:, None, None].expand(-1, -1, scores.shape[-1])).squeeze(1)
        assert bool(torch.isfinite(behind.gather(1, last[:, None])).all()), "a token outside the support"
        # An unstable sort may keep the other one of two equal tokens.
        outside = (~torch.isfinite(scores[:, n:].gather(-1, drafts[..., None]))).sum()
        assert int(outside) <= drafts.numel() // 100, f"{int(outside)} drafts outside the support"

    return check


def arms_of(size: Size, sampling: str, rule: str, dtype: torch.dtype, options: Options) -> list[Arm]:
    step = step_of(size, sampling, options.device, rule != REJECTION)
    step.logits.copy_(step.logits.to(dtype))
    typed = replace(step, logits=step.logits.to(dtype))
    arms = [
        Arm("ours", OURS, lambda: ours(typed), check),
        Arm("loop over requests", REFERENCE, lambda: by_request(rule, typed)),
        Arm("Triton", KERNEL, lambda: by_kernels(typed), check, needs_gpu=True, note="q is copied first" if rule == REJECTION else ""),
    ]
    if rule == GREEDY:
        arms.append(Arm("argmax of all rows", FLOOR, lambda: typed.logits.argmax(-1)))
    else:
        chained = Arm("SGLang, sampled chain", LIBRARY, lambda: sampled_chain(typed, sampling), check_draw(step), note="no key, lower acceptance")
        arms.append(chained)
    if rule == REJECTION:
        chain = Chain(step)
        arms.append(Arm("flashinfer + SGLang chain", LIBRARY, lambda: chain_on_gpu(typed, chain), check_draw(step), needs_gpu=True, note="no key"))
    return arms


def cases(options: Options) -> Iterator[Case]:
    for size in sizes(options):
        for name, sampling, rule, dtype in VARIANTS:
            yield Case(name, size.dims(dtype), partial(arms_of, size, sampling, rule, dtype, options), size.cells)
