"""From log p of the verifying rows to accepted drafts and the token behind them, by each of the three rules.

`ours` composes the functions of `isd.verify` as `isd_step` does; it is checked against loops over the requests and against
`isd_step` itself. The argmax over the vocabulary is part of it, as it is of the alternatives' inputs. SGLang's and FlashInfer's kernels
verify a chain: greedy by `verify_tree_greedy`, rejection by `chain_speculative_sampling`, with uniforms that are not keyed. transformers'
function takes one request, and does its softmaxes itself.
"""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.kernels.harness import KERNEL, LIBRARY, OURS, REFERENCE, Arm, Case, Options, assert_equal
from benchmarks.kernels.inputs import Size, Step, sizes, step_of
from idlm_sglang.isd import isd_step, noise, step_positions, target_scores
from idlm_sglang.isd.verify import accepted_by_rejection, leading, residual, valid_drafts

GREEDY, COUPLED, REJECTION = "greedy", "coupled", "rejection"


def ours(rule: str, step: Step, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(accepted drafts ``(B,)``, the token behind them ``(B,)``) from ``scores`` ``(B, K + 1, V)``."""
    k, vocab = step.drafts.shape[1], scores.shape[-1]
    positions = step_positions(step.seq_lens, k + 1)
    if rule == REJECTION:
        accepted = accepted_by_rejection(scores[:, :k], step.q, step.drafts, step.rows.seed, positions[:, :k])
    else:
        noisy = scores if rule == GREEDY else scores + noise.gumbel(step.rows.seed, positions, vocab)
        yielded = noisy.argmax(-1)
        accepted = yielded[:, :k] == step.drafts
    run = leading(accepted & valid_drafts(step.counts, k))
    at = run[:, None]
    if rule != REJECTION:
        return run, yielded.gather(1, at).squeeze(1)
    row = at[..., None].expand(-1, -1, vocab)
    q_row = step.q.gather(1, row.clamp(max=k - 1)).squeeze(1)
    g = noise.gumbel(step.rows.seed, positions.gather(1, at), vocab, noise.STREAM_FINAL).squeeze(1)
    return run, (residual(scores.gather(1, row).squeeze(1), q_row, run != step.counts) + g).argmax(-1)


def in_loops(rule: str, step: Step, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One request and one draft at a time."""
    vocab = scores.shape[-1]
    runs, lasts = [], []
    for b in range(len(scores)):
        seed, position = step.rows.seed[b : b + 1], int(step.seq_lens[b])

        def at(i: int) -> torch.Tensor:
            return torch.tensor([[position + i]], device=scores.device)

        run, last = 0, None
        while last is None:
            p = scores[b, run]
            drafted = run < int(step.counts[b])
            if rule == REJECTION:
                left = p.exp()
                if drafted:
                    token, q = int(step.drafts[b, run]), step.q[b, run]
                    if float(noise.uniform(seed, at(run), noise.STREAM_ACCEPT)) * float(q[token]) < float(p[token].exp()):
                        run += 1
                        continue
                    left = (left - q).clamp(min=0)
                    left = left if float(left.sum()) > 0 else p.exp()
                last = int((left.log() + noise.gumbel(seed, at(run), vocab, noise.STREAM_FINAL)[0, 0]).argmax())
            else:
                token = int((p if rule == GREEDY else p + noise.gumbel(seed, at(run), vocab)[0, 0]).argmax())
                if drafted and token == int(step.drafts[b, run]):
                    run += 1
                else:
                    last = token
        runs.append(run)
        lasts.append(last)
    return torch.tensor(runs, device=scores.device), torch.tensor(lasts, device=scores.device)


class Chain:
    """The buffers in which SGLang's kernels want a chain of ``N`` candidates per request."""

    def __init__(self, step: Step):
        batch, k = step.drafts.shape
        device = step.drafts.device
        n = k + 1
        self.candidates = torch.cat([torch.zeros(batch, 1, dtype=torch.int64, device=device), step.drafts], dim=1)
        self.index = torch.arange(batch * n, device=device).view(batch, n)
        self.next = torch.arange(1, n + 1, device=device).repeat(batch, 1)
        self.next[:, -1] = -1
        self.sibling = torch.full_like(self.next, -1)
        self.predicts = torch.zeros(batch * n, dtype=torch.int32, device=device)
        self.accept_index = torch.full((batch, n), -1, dtype=torch.int32, device=device)
        self.accepted = torch.zeros(batch, dtype=torch.int32, device=device)

    def outcome(self) -> tuple[torch.Tensor, torch.Tensor]:
        run = self.accepted.long()
        place = self.accept_index.gather(1, run[:, None]).long().squeeze(1)
        return run, self.predicts[place].long()


def sglang_greedy(chain: Chain, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from sglang.kernels.ops.speculative.spec_tree import verify_tree_greedy_func

    verify_tree_greedy_func(
        chain.predicts, chain.accept_index, chain.accepted, chain.candidates, chain.index, chain.next, chain.sibling, scores.argmax(-1), topk=1
    )
    return chain.outcome()


def sglang_rejection(chain: Chain, p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``p`` ``(B, N, V)``, ``q`` ``(B, K, V)`` probabilities."""
    from sglang.kernels.ops.speculative.reject_sampling import chain_speculative_sampling_triton

    batch, n = chain.candidates.shape
    chain_speculative_sampling_triton(
        chain.predicts, chain.accept_index, chain.accepted, chain.candidates, chain.index, chain.next, chain.sibling,
        torch.rand(batch, n, device=p.device), torch.rand(batch, device=p.device), p, q, 1.0, 1.0, True,
    )  # fmt: skip
    return chain.outcome()


def flashinfer_rejection(step: Step, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from flashinfer.sampling import chain_speculative_sampling

    tokens, _, run = chain_speculative_sampling(step.q, step.drafts.int(), p)
    return run.long(), tokens.gather(1, run.long()[:, None]).squeeze(1).long()


def transformers_rejection(step: Step, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers.generation.utils import _speculative_sampling

    tokens, run = _speculative_sampling(step.drafts, step.q.log(), step.drafts.shape[1], scores)
    return run.view(1), tokens[:, -1]


def check_draw(step: Step, scores: torch.Tensor):
    """Of any draw: 0 to K drafts stand, the token behind them has mass under p, and a draft that p rules out never stands."""

    def check(got: tuple[torch.Tensor, torch.Tensor], want) -> None:
        run, last = got
        k = step.drafts.shape[1]
        assert int(run.min()) >= 0 and int(run.max()) <= k, f"{run.tolist()} drafts accepted"
        assert torch.isfinite(scores.gather(1, run[:, None, None].expand(-1, -1, scores.shape[-1])).squeeze(1).gather(1, last[:, None])).all(), "token without mass"
        possible = torch.isfinite(scores[:, :k].gather(-1, step.drafts[..., None]).squeeze(-1))
        assert bool((possible | (torch.arange(k, device=run.device) >= run[:, None])).all()), "an impossible draft stands"

    return check


def check_ours(step: Step):
    """Bit for bit the loops' outcome, and `isd_step`'s."""
    whole = isd_step(*step.arguments, tables=step.tables)
    outcome = (whole.accept_lens.long() - 1, whole.last)

    def check(got, want) -> None:
        assert_equal(got, want)
        assert_equal(got, outcome)

    return check


def kernel_rows(step: Step):
    """The step as the kernels take it."""
    from idlm_kernels.rows import Rows, step_rows

    return Rows(step.logits, *step_rows(step.counts, step.seq_lens, step.drafts.shape[1]))


def by_kernel(step: Step):
    """`idlm_kernels.verify` on draws that are there already."""
    from idlm_kernels.choose import choose
    from idlm_kernels.truncate import truncate
    from idlm_kernels.verify import verify

    rows = kernel_rows(step)
    draws = truncate(rows, step.rows, choose(rows, step.rows))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        found = verify(rows, step.rows, draws, step.drafts, step.counts, step.log_q, step.limits, step.q)
        return found.deciding, found.last

    return run


def arms_of(size: Size, rule: str, options: Options) -> list[Arm]:
    step = step_of(size, GREEDY if rule == GREEDY else "temperature", options.device, rule == COUPLED)
    scores = target_scores(step.logits[:, : size.stride], step.rows)
    arms = [
        Arm("ours", OURS, lambda: ours(rule, step, scores), check_ours(step)),
        Arm("loop over drafts", REFERENCE, lambda: in_loops(rule, step, scores)),
    ]
    ready = by_kernel(step) if options.device == "cuda" else None
    arms.append(Arm("Triton", KERNEL, ready, check_ours(step), needs_gpu=True, note="from draws: without the argmax"))
    chain = Chain(step)
    if rule == GREEDY:
        arms.append(Arm("SGLang, tree", LIBRARY, lambda: sglang_greedy(chain, scores), needs_gpu=True))
    if rule == REJECTION:
        p, any_draw = scores.exp(), check_draw(step, scores)
        alone = "" if size.batch == 1 else "takes one request"
        arms += [
            Arm("transformers", LIBRARY, lambda: transformers_rejection(step, scores), any_draw, absent=alone, note="no key; softmaxes included"),
            Arm("SGLang, chain", LIBRARY, lambda: sglang_rejection(chain, p, step.q), any_draw, needs_gpu=True, note="no key; p given"),
            Arm("flashinfer, chain", LIBRARY, lambda: flashinfer_rejection(step, p), any_draw, needs_gpu=True, note="no key; p given"),
        ]
    return arms


def cases(options: Options) -> Iterator[Case]:
    for size in sizes(options):
        for rule in (GREEDY, COUPLED, REJECTION):
            yield Case(rule, size.dims(), partial(arms_of, size, rule, options), size.cells)
