"""From log q of the MASK rows to the next drafts: `isd.propose.propose` and the draw in front of it.

The rejection rule keeps q, ``(B, K, V)``; the others do not. SGLang's way to draw one token per row is `torch.multinomial`, or a
race of exponentials (SGLANG_OPT_USE_GUMBEL_SAMPLE); both here with the log q of what they drew, neither with a key.
"""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.kernels.harness import LIBRARY, OURS, REFERENCE, Arm, Case, Options
from benchmarks.kernels.inputs import Size, peaked_logits, sampling_rows, sizes
from idlm_sglang.isd import noise, step_positions, target_scores
from idlm_sglang.isd.propose import propose
from idlm_sglang.isd.tables import StepTables


def ours(step_scores: torch.Tensor, rows, positions: torch.Tensor, limits: torch.Tensor, tables: StepTables):
    """(drafts, log q, q or None) from the scores of all 2K + 1 rows, the last K of which are MASK rows."""
    k = positions.shape[1]
    scores = step_scores[:, k + 1 :]
    noisy = scores + noise.gumbel(rows.seed, positions, scores.shape[-1]) if rows.any_sampled else scores
    chosen = torch.cat([positions.new_zeros(len(positions), k + 1), noisy.argmax(-1)], dim=1)
    found = propose(step_scores, chosen, rows, limits, limits, limits, False, tables)
    return found.drafts, found.log_q, found.q


def in_loops(scores: torch.Tensor, rows, positions: torch.Tensor, keep_q: bool):
    """Row by row."""
    batch, k, vocab = scores.shape
    drafts = torch.empty(batch, k, dtype=torch.int64, device=scores.device)
    log_q = torch.zeros(batch, k, device=scores.device)
    q = torch.empty_like(scores) if keep_q else None
    for b in range(batch):
        for i in range(k):
            row = scores[b, i]
            if rows.any_sampled:
                drafts[b, i] = (row + noise.gumbel(rows.seed[b : b + 1], positions[b : b + 1, i : i + 1], vocab)[0, 0]).argmax()
                log_q[b, i] = row[drafts[b, i]]
            else:
                drafts[b, i] = row.argmax()
            if keep_q:
                q[b, i] = row.exp()
    return drafts, log_q, q


def check(got, want) -> None:
    """Drafts bit for bit, the rest within rounding."""
    assert torch.equal(got[0], want[0]), f"{int((got[0] != want[0]).sum())} drafts differ"
    torch.testing.assert_close(got[1], want[1])
    if want[2] is not None:
        torch.testing.assert_close(got[2], want[2])


def race(probs: torch.Tensor) -> torch.Tensor:
    """What SGLang does under SGLANG_OPT_USE_GUMBEL_SAMPLE."""
    return (probs / torch.empty_like(probs).exponential_().clamp_min_(torch.finfo(torch.float32).tiny)).argmax(-1, keepdim=True)


def drawn(scores: torch.Tensor, draw):
    """(drafts, log q, probabilities) with ``draw`` on the flat probabilities."""
    probs = scores.exp()
    drafts = draw(probs.view(-1, scores.shape[-1])).view(scores.shape[:2]).long()
    return drafts, scores.gather(-1, drafts[..., None]).squeeze(-1), probs


def check_draw(got, want) -> None:
    assert bool(torch.isfinite(got[1]).all()), "a draft without mass"


def arms_of(size: Size, rule: str, options: Options) -> list[Arm]:
    device, k = options.device, size.k
    rows = sampling_rows("greedy" if rule == "greedy" else "temperature", size.batch, device, rule != "rejection")
    scores = target_scores(peaked_logits((size.batch, k), size.vocab, device), rows)
    step_scores = torch.cat([scores.new_zeros(size.batch, k + 1, size.vocab), scores], dim=1)
    positions = step_positions(torch.arange(size.batch, device=device) * 37 + 100 + size.stride, k)
    limits = torch.full((size.batch,), k, device=device)
    keep_q, tables = rule == "rejection", StepTables(k, device)
    arms = [
        Arm("ours", OURS, lambda: ours(step_scores, rows, positions, limits, tables), check),
        Arm("loop over rows", REFERENCE, lambda: in_loops(scores, rows, positions, keep_q)),
    ]
    if rule != "greedy":

        def flashinfer_draw(probs: torch.Tensor) -> torch.Tensor:
            from flashinfer.sampling import sampling_from_probs

            return sampling_from_probs(probs)

        arms += [
            Arm("torch multinomial", LIBRARY, lambda: drawn(scores, lambda p: torch.multinomial(p, 1)), check_draw, note="no key"),
            Arm("race of exponentials", LIBRARY, lambda: drawn(scores, race), check_draw, note="no key"),
            Arm("flashinfer", LIBRARY, lambda: drawn(scores, flashinfer_draw), check_draw, needs_gpu=True, note="no key"),
        ]
    return arms


def cases(options: Options) -> Iterator[Case]:
    for size in sizes(options):
        for rule in ("greedy", "coupled", "rejection"):
            yield Case(rule, size.dims(), partial(arms_of, size, rule, options), size.batch * size.k * size.vocab)
