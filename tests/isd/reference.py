"""Independent references in numpy and plain integers, and a batched simulation of ISD over a tabular model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from scipy import stats

from idlm_sglang.isd import OFF as DROPPED
from idlm_sglang.isd import SamplingRows, StepOutcome, isd_step, layout, step_tokens
from idlm_sglang.isd.target import host_flags

OFF = 1 << 30
NEG = float("-inf")


@dataclass(frozen=True)
class Params:
    """Sampling parameters of one request; ``top_k=1`` is greedy."""

    temperature: float = 1.0
    top_k: int = OFF
    top_p: float = 1.0
    min_p: float = 0.0
    coupled: bool = False

    @property
    def truncated(self) -> bool:
        return self.top_k < OFF or self.top_p < 1 or self.min_p > 0


GREEDY = Params(top_k=1)


def sampling_rows(params: list[Params], seeds: torch.Tensor) -> SamplingRows:
    """One row per entry of ``params``, flags as an engine would set them."""
    sampled = [row for row in params if row.top_k > 1]
    return SamplingRows(
        temperature=torch.tensor([row.temperature for row in params]),
        top_k=torch.tensor([row.top_k for row in params], dtype=torch.int32),
        top_p=torch.tensor([row.top_p for row in params]),
        min_p=torch.tensor([row.min_p for row in params]),
        seed=seeds.to(torch.int64),
        coupled=torch.tensor([row.coupled for row in params]),
        any_sampled=bool(sampled),
        any_rejection=any(not row.coupled for row in sampled),
        **host_flags((row.top_k, row.top_p, row.min_p) for row in params),
    )


def target_probs(logits: np.ndarray, params: Params) -> np.ndarray:
    """``(n, V)`` float64 probabilities; rule by rule, row by row."""
    result = np.zeros(logits.shape)
    for row, scores in enumerate(np.asarray(logits, dtype=np.float64)):
        if params.top_k == 1:
            result[row, np.argmax(scores)] = 1
            continue
        scores = scores / params.temperature
        probs = np.exp(scores - scores.max())
        probs /= probs.sum()
        order = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
        mass = 0.0
        for rank, token in enumerate(order):
            # A nucleus of 1 is the whole vocabulary, however the rounded sum comes out.
            inside = rank < params.top_k and (mass <= params.top_p or params.top_p >= 1)
            if rank == 0 or (inside and probs[token] >= probs[order[0]] * params.min_p):
                result[row, token] = probs[token]
            mass += probs[token]
        result[row] /= result[row].sum()
    return result


class Tabular:
    """A causal model whose logits are any function of the last ``order`` tokens, MASK (id ``vocab``) among them.

    A row whose context holds a MASK is a draft's q, any other row is a p: the two are unrelated.

    Args:
        vocab: real tokens.
        p_zeros, q_zeros: share of tokens that a p or q row rules out.
        q_one_hot: every q row has one token only.
        context: share of the logits' spread that comes from the context; 0 gives the same p everywhere, at
            MASK rows too (q = p), and small values a q near p.
        spread: standard deviation of the logits.
        step: logits are rounded to multiples of this, which makes ties.
    """

    def __init__(
        self, vocab=3, order=5, seed=0, p_zeros=0.0, q_zeros=0.0, q_one_hot=False, context=1.0, spread=1.2, step=0.0
    ):
        self.vocab, self.order, self.mask = vocab, order, vocab
        base = vocab + 1
        random = torch.Generator().manual_seed(seed)
        codes = torch.arange(base**order)
        masked = torch.stack([codes // base**i % base == vocab for i in range(order)]).any(0)
        table = torch.randn(len(codes), vocab, generator=random)
        table = (context * table + (1 - context) * table[:1]) * spread
        if step:
            table = (table / step).round() * step
        alive = torch.randint(vocab, (len(codes), 1), generator=random)
        share = torch.where(masked, q_zeros, p_zeros)[:, None]
        off = torch.rand(table.shape, generator=random) < share
        off |= masked[:, None] & q_one_hot
        table = table.masked_fill(off.scatter(1, alive, False), NEG)
        self.table = torch.cat([table, torch.full((len(codes), 1), NEG)], dim=1)
        self.powers = base ** torch.arange(order - 1, -1, -1)
        self.prompt = [i % vocab for i in range(order)]

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """``(B, order - 1 + W)`` tokens to ``(B, W, vocab + 1)``."""
        return self.table[(tokens.unfold(1, self.order, 1) * self.powers).sum(-1)]

    def step_logits(self, window, pending, drafts, counts, forks) -> torch.Tensor:
        """``(B, W, vocab + 1)`` of one step, a branch written out: MASK rows behind the first ``forks`` drafts, as if there were no others."""
        k = drafts.shape[1]
        chain = self.logits(torch.cat([window, step_tokens(pending, drafts, counts, self.mask)], dim=1))
        ahead = self.logits(torch.cat([window, step_tokens(pending, drafts, forks, self.mask)], dim=1))
        row = torch.arange(2 * k + 1)
        index = torch.where(row > counts[:, None], row - (counts - forks)[:, None], row)
        masked = ahead.gather(1, index[..., None].expand_as(ahead))
        return torch.where((row > counts[:, None])[..., None], masked, chain)

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """The calling form of :func:`idlm_sglang.isd.decode.decode`: every row, contexts filled up with token 0."""
        if visible is None:
            assert torch.equal(positions, torch.arange(tokens.shape[1])[None])
            return self.logits(torch.nn.functional.pad(tokens, (self.order - 1, 0)))
        rows = []
        for i in range(tokens.shape[1]):
            seen = tokens[0, : i + 1][visible[0, i, : i + 1]]
            assert positions[0, i] == len(seen) - 1, "a row stands behind what it sees"
            rows.append(self.logits(torch.nn.functional.pad(seen[None], (self.order - 1, 0)))[:, -1])
        return torch.stack(rows, dim=1)

    def law(self, params: Params, length: int) -> np.ndarray:
        """Probability of every sequence of ``length`` tokens under plain AR, in base-``vocab`` order."""
        base = self.vocab + 1
        contexts = np.array([int((torch.tensor(self.prompt) * self.powers).sum())])
        probs = np.ones(1)
        for _ in range(length):
            p = target_probs(self.table[contexts, : self.vocab].numpy(), params)
            probs = (probs[:, None] * p).ravel()
            contexts = ((contexts * base % base**self.order)[:, None] + np.arange(self.vocab)).ravel()
        return probs


@dataclass
class Emitted:
    """``tokens`` ``(B, length)`` and, over all steps that counted, ``forwards`` and drafts ``salvaged`` (survivors accepted) per request."""

    tokens: torch.Tensor
    forwards: torch.Tensor
    salvaged: torch.Tensor


@torch.no_grad()
def emit(
    model: Tabular,
    rows: SamplingRows,
    length: int,
    strides: int | Iterable[int],
    limits: Callable[[int, int], torch.Tensor] | None = None,
    survivors: Callable[[StepOutcome], torch.Tensor] | None = None,
    salvage: str = DROPPED,
    masks: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Emitted:
    """Run ISD on the model's prompt for every request of ``rows`` until each has ``length`` tokens.

    Args:
        strides: the stride of all steps, or one per step.
        limits: ``(batch, k)`` to the ``(B,)`` limits of a step; k everywhere without it.
        survivors: outcome of a step to the number of drafts kept from it; all without it.
        salvage: what a rejection leaves.
        masks: drafts of a step ``(B, K)``, how many of them are valid ``(B,)``, and how many the step before accepted ``(B,)``, to the ``(B,)`` MASK
            rows of each request; K without it.
    """
    batch = len(rows.seed)
    prompt = torch.tensor(model.prompt).repeat(batch, 1)
    window = prompt[:, 1:]
    seq_lens = torch.full((batch,), len(model.prompt))
    zero = torch.zeros(batch, dtype=torch.int64)
    none = (
        torch.zeros(batch, 0, dtype=torch.int64),
        zero,
        torch.zeros(batch, 0),
        torch.zeros(batch, 0, model.vocab + 1),
    )
    first = isd_step(model.logits(prompt), *none, zero, seq_lens - 1, rows)
    out = torch.cat([first.last[:, None], torch.zeros(batch, length, dtype=torch.int64)], dim=1)
    filled = torch.ones_like(zero)
    forwards, salvaged = torch.zeros_like(zero), torch.zeros_like(zero)
    pending, proposal, counts, run = first.last, first.proposal, zero, zero
    for stride in repeat(strides) if isinstance(strides, int) else strides:
        if int(filled.min()) >= length:
            break
        forwards += filled < length
        k = stride - 1
        drafts, log_q, q = (fit(part, k) for part in (proposal.drafts, proposal.log_q, proposal.q))
        counts = counts.clamp(max=k)
        clean = torch.minimum(proposal.clean, counts)
        forks = layout.forks(clean, counts, salvage)
        sequence = torch.cat([window, step_tokens(pending, drafts, counts, model.mask)], dim=1)
        bounds = torch.full((batch,), k) if limits is None else limits(batch, k)
        logits = model.step_logits(window, pending, drafts, counts, forks)
        left = None if masks is None else masks(drafts, counts, run)
        result = isd_step(logits, drafts, counts, log_q, q, bounds, seq_lens, rows, forks, salvage != DROPPED, masks=left)
        salvaged += (result.accept_lens - 1) * (clean < counts) * (filled < length)
        column = torch.arange(stride)
        place = filled[:, None] + column
        place = torch.where((column < result.accept_lens[:, None]) & (place < length), place, length)
        out.scatter_(1, place, result.tokens)
        filled = filled + result.accept_lens
        seq_lens = seq_lens + result.accept_lens
        run = result.accept_lens.to(torch.int64) - 1
        window = sequence.gather(1, result.accept_lens[:, None] + torch.arange(model.order - 1))
        pending, proposal = result.last, result.proposal
        counts = proposal.counts if survivors is None else survivors(result)
    assert int(filled.min()) >= length, "too few strides"
    return Emitted(out[:, :length], forwards, salvaged)


def fit(part: torch.Tensor | None, k: int) -> torch.Tensor | None:
    """The first ``k`` columns, filled up with zeros: what a stored draft is when the stride changes."""
    if part is None or part.shape[1] >= k:
        return None if part is None else part[:, :k]
    return torch.cat([part, part.new_zeros(part.shape[0], k - part.shape[1], *part.shape[2:])], dim=1)


def fit_p(tokens: torch.Tensor, vocab: int, law: np.ndarray) -> float:
    """Chi-square p-value of ``(n, length)`` tokens against the ``(vocab ** length,)`` law; 0 for an impossible token."""
    if int(tokens.max()) >= vocab:
        return 0.0
    length = tokens.shape[1]
    code = (tokens * vocab ** torch.arange(length - 1, -1, -1)).sum(1)
    observed = np.bincount(code.numpy(), minlength=vocab**length).astype(float)
    return counts_p(observed, law * len(tokens))


def counts_p(observed: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square p-value; cells that expect fewer than 5 are pooled."""
    if observed[expected == 0].sum() > 0:
        return 0.0
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 5:
        observed[-2], expected[-2] = observed[-2:].sum(), expected[-2:].sum()
        observed, expected = observed[:-1], expected[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(stats.chi2.sf(statistic, len(expected) - 1)) if len(expected) > 1 else 1.0


def window_laws(law: np.ndarray, vocab: int, length: int) -> dict[str, tuple[slice, np.ndarray]]:
    """The joint law and those of every single token, pair and triple of neighbours in it."""
    joint = law.reshape((vocab,) * length)
    laws = {"joint": (slice(0, length), law)}
    for width, name in ((1, "single"), (2, "pair"), (3, "triple")):
        for start in range(length - width + 1):
            rest = tuple(axis for axis in range(length) if not start <= axis < start + width)
            laws[f"{name} {start + 1}"] = slice(start, start + width), joint.sum(axis=rest).ravel()
    return laws


def worst_p(tokens: torch.Tensor, vocab: int, law: np.ndarray) -> tuple[float, str]:
    """Smallest p-value over the joint law, singles, pairs and triples, and where; not corrected for their number."""
    laws = window_laws(law, vocab, tokens.shape[1])
    return min((fit_p(tokens[:, part], vocab, expected), name) for name, (part, expected) in laws.items())
