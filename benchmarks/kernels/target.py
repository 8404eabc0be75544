"""Logits to the request's own distribution: `isd.target.target_scores`, on all W rows of every request.

The reference filters row by row. SGLang's PyTorch sampler keeps the filtered weights in sorted order and draws a token on the
way (its filter has no other way out); transformers' warpers apply top-p and min-p one row after the other rule, so they are
comparable where one rule is on. bf16 logits are cast first, as the worker does.
"""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.kernels.harness import LIBRARY, OURS, REFERENCE, Arm, Case, Options
from benchmarks.kernels.inputs import SAMPLING, Size, peaked_logits, sampling_rows, sizes
from idlm_sglang.isd import SamplingRows, target_scores

VARIANTS = ("temperature", "top-p", "min-p", "paper")


def filtered(scores: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Log p of one row ``(V,)`` under the joint rule, from its log-probabilities; ties go to the lower id."""
    probs = scores.exp()
    order = torch.argsort(probs, descending=True, stable=True)
    ranked = probs[order]
    before = ranked.double().cumsum(0) - ranked.double()
    kept = len(order) if top_p >= 1 else int((before <= top_p).sum())
    kept = min(kept, max(top_k, 1), int((ranked >= ranked[0] * min_p).sum()))
    inside = order[: max(kept, 1)]
    out = torch.full_like(scores, float("-inf"))
    out[inside] = torch.log_softmax(scores[inside], 0)
    return out


def by_row(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """``target_scores`` in loops."""
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    parameters = zip(rows.temperature.tolist(), rows.top_k.tolist(), rows.top_p.tolist(), rows.min_p.tolist())
    for request, (temperature, top_k, top_p, min_p) in enumerate(parameters):
        for row, scores in enumerate(logits[request].float()):
            truncates = top_k < len(scores) or top_p < 1 or min_p > 0
            scores = scores if top_k <= 1 else torch.log_softmax(scores / temperature, 0)
            out[request, row] = filtered(scores, top_k, top_p, min_p) if truncates and top_k > 1 else scores
    return out


def same_distribution(got: torch.Tensor, want: torch.Tensor, edge: int = 1) -> None:
    """Log-probabilities ``(.., V)``: equal supports but for ``edge`` tokens on the edge of each, and total variation below 1e-3."""
    differing = ((got > -torch.inf) != (want > -torch.inf)).sum(-1)
    assert int(differing.max()) <= edge, f"a row's support differs in {int(differing.max())} tokens"
    distance = (got.double().exp() - want.double().exp()).abs().sum(-1).max().item() / 2
    assert distance < 1e-3, f"total variation {distance:.2g}"


def by_sglang(logits: torch.Tensor, rows: SamplingRows, variant: str):
    """SGLang's PyTorch path: softmax, sort, filter, draw; filtered weights in sorted order and their token ids."""
    from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch

    batch, width, vocab = logits.shape
    probs = torch.softmax(logits.float() / rows.temperature[:, None, None], dim=-1).view(-1, vocab)
    if not rows.any_truncated:
        return probs.view(batch, width, vocab)
    top_k, top_p, min_p = (part.repeat_interleave(width) for part in (rows.top_k, rows.top_p, rows.min_p))
    need_min_p = SAMPLING[variant][3] > 0
    return top_k_top_p_min_p_sampling_from_probs_torch(probs, top_k, top_p, min_p, need_min_p, None, None, return_filtered_probs=True)


def check_sglang(got, want: torch.Tensor) -> None:
    """By size, not by token: its sort is not stable, and of equal tokens on an edge it may keep the other one."""
    weights = (got[1] if isinstance(got, tuple) else got).view_as(want)
    ranked = (weights / weights.sum(-1, keepdim=True)).sort(-1, descending=True).values
    same_distribution(ranked.log(), want.sort(-1, descending=True).values)


def by_warpers(logits: torch.Tensor, rows: SamplingRows, variant: str) -> torch.Tensor:
    """transformers' warpers, in the order `generate` uses."""
    from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopPLogitsWarper

    temperature, _, top_p, min_p = SAMPLING[variant]
    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(min_p))
    flat = logits.float().view(-1, logits.shape[-1])
    return torch.log_softmax(warpers(None, flat), dim=-1).view(logits.shape)


def by_flashinfer(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """FlashInfer's renormalisations, joined as SGLang joins them."""
    from flashinfer.sampling import top_k_renorm_probs, top_p_renorm_probs

    batch, width, vocab = logits.shape
    full = torch.softmax(logits.float() / rows.temperature[:, None, None], dim=-1).view(-1, vocab)
    top_k, top_p, min_p = (part.repeat_interleave(width) for part in (rows.top_k, rows.top_p, rows.min_p))
    probs = top_k_renorm_probs(full, top_k.clamp(max=vocab))
    probs = probs.masked_fill(top_p_renorm_probs(full, top_p) <= 0, 0)
    probs = probs.masked_fill(full < full.amax(-1, keepdim=True) * min_p[:, None], 0)
    return (probs / probs.sum(-1, keepdim=True)).log().view(batch, width, vocab)


def arms_of(size: Size, variant: str, dtype: torch.dtype, options: Options) -> list[Arm]:
    rows = sampling_rows(variant, size.batch, options.device)
    logits = peaked_logits((size.batch, size.width), size.vocab, options.device).to(dtype)
    arms = [
        Arm("ours", OURS, lambda: target_scores(logits.float(), rows), same_distribution),
        Arm("loop over rows", REFERENCE, lambda: by_row(logits, rows)),
        Arm("SGLang, torch", LIBRARY, lambda: by_sglang(logits, rows, variant), check_sglang, note="draws a token too" if rows.any_truncated else "no log"),
    ]
    if variant != "paper":
        # Its nucleus is cut by a float32 sum over the whole tail.
        nearly = partial(same_distribution, edge=max(1, size.vocab // 10_000))
        arms.append(Arm("transformers", LIBRARY, lambda: by_warpers(logits, rows, variant), nearly))
    arms.append(Arm("flashinfer", LIBRARY, lambda: by_flashinfer(logits, rows), same_distribution, needs_gpu=True))
    return arms


def cases(options: Options) -> Iterator[Case]:
    for size in sizes(options):
        for variant, dtype in [*((variant, torch.float32) for variant in VARIANTS), ("paper", torch.bfloat16)]:
            yield Case(variant, size.dims(dtype), partial(arms_of, size, variant, dtype, options), size.cells)
