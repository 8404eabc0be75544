"""Logits to the request's own target distribution: temperature, then top-k, top-p and min-p on the same sorted
probabilities (the joint rule of SGLang's samplers). Ties are broken by the lower token id, so that the support of a
row never depends on the batch."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy
import torch

from idlm_sglang.isd import noise

# A top_k from here on is none at all.
TOP_K_OFF = 1 << 30

# NumPy's argmax is several times as fast as one thread of torch's, and has one.
_THREADS, _FEW = 5, 1 << 20

# Of a large vocabulary a nucleus is a few tokens: on a host so many of the largest are looked at before all are sorted.
_NUCLEUS, _LARGE = 1 << 10, 1 << 14


@dataclass(frozen=True)
class SamplingRows:
    """Sampling parameters of ``B`` requests. Tensors on the compute device, flags on the host.

    A request is greedy when ``top_k <= 1`` (SGLang turns temperature 0 into that).

    Attributes:
        temperature: ``(B,)`` float32, > 0.
        top_k: ``(B,)`` int32; a value >= V switches it off.
        top_p: ``(B,)`` float32; 1 switches it off.
        min_p: ``(B,)`` float32; 0 switches it off.
        seed: ``(B,)`` int64, keys the noise of the request.
        coupled: ``(B,)`` bool, the request uses the coupled rule; otherwise rejection. Ignored when greedy.
        any_sampled: some request is not greedy.
        any_truncated: some sampled request uses top-k, top-p or min-p.
        any_rejection: some sampled request uses the rejection rule.
        largest_top_k: no truncating request has a larger top_k; None where one has none, or it is not known.
        min_p_only: no sampled request uses top-k or top-p. These two save a sort of the vocabulary and change no result.
        any_greedy: some request may be greedy; False saves passes over the scores and changes no result.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    coupled: torch.Tensor
    any_sampled: bool
    any_truncated: bool
    any_rejection: bool
    largest_top_k: int | None = None
    min_p_only: bool = False
    any_greedy: bool = True

    @property
    def greedy(self) -> torch.Tensor:
        """``(B,)`` bool."""
        return self.top_k <= 1

    def at(self, index: torch.Tensor | slice) -> "SamplingRows":
        """Those of the requests ``index`` ``(B',)`` int64, or of a slice."""
        tensors = {name: getattr(self, name)[index] for name in ("temperature", "top_k", "top_p", "min_p", "seed", "coupled")}
        return replace(self, **tensors)


def host_flags(params: Iterable[tuple[int, float, float]]) -> dict:
    """What :class:`SamplingRows` knows on the host but for the two rules, from the (top_k, top_p, min_p) of all requests of a batch."""
    params = list(params)
    sampled = [one for one in params if one[0] > 1]
    top_ks = [top_k for top_k, top_p, min_p in sampled if top_k < TOP_K_OFF or top_p < 1 or min_p > 0]
    largest = max(top_ks, default=TOP_K_OFF)
    return {
        "any_greedy": len(sampled) < len(params),
        "any_truncated": bool(top_ks),
        "largest_top_k": largest if largest < TOP_K_OFF else None,
        "min_p_only": all(top_k >= TOP_K_OFF and top_p >= 1 for top_k, top_p, _ in sampled),
    }


def _ordered(probs: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``most`` largest of each row in falling order and their ids, equal ones by id: a stable sort's first columns."""
    vocab = probs.shape[-1]
    if most > vocab // 8:
        ordered, index = torch.sort(probs, dim=-1, descending=True, stable=True)
        return ordered[..., :most], index[..., :most]
    flat = probs.contiguous().view(-1, vocab)
    # A host goes by as many rows as its caches hold.
    parts = flat.split(max(noise.BLOCK // vocab, 1)) if noise.on_host(probs) else (flat,)
    index = torch.cat([_largest(part, most) for part in parts]).view(*probs.shape[:-1], most)
    return probs.gather(-1, index), index


def _largest(probs: torch.Tensor, most: int) -> torch.Tensor:
    """The ids ``(R, most)`` of the largest of each row ``(R, V)`` in falling order, equal ones by id."""
    # One integer per token, as large as its probability and, among equals, the larger the lower its id: topk alone promises no order of equals.
    last = torch.arange(probs.shape[-1] - 1, -1, -1, device=probs.device)
    keys = (probs.view(torch.int32).to(torch.int64) << 32) | last
    return probs.shape[-1] - 1 - (keys.topk(most).values & 0xFFFFFFFF)


def support(
    probs: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    largest_top_k: int | None = None,
    min_p_only: bool = False,
) -> torch.Tensor:
    """Which tokens survive top-k, top-p and min-p.

    Args:
        probs: ``(B, R, V)`` probabilities.
        top_k, top_p, min_p, largest_top_k, min_p_only: as in :class:`SamplingRows`; rows that truncate nothing may get any support.

    Returns:
        ``(B, R, V)`` bool; the most probable token always survives.
    """
    if min_p_only:
        keep = probs >= probs.amax(-1, keepdim=True) * min_p[:, None, None]
        return keep.scatter_(-1, best(probs)[..., None], True)
    vocab = probs.shape[-1]
    most = vocab if largest_top_k is None else min(largest_top_k, vocab)
    if most > _NUCLEUS and vocab >= _LARGE and noise.on_host(probs):
        keep, index = _kept(probs, top_k, top_p, min_p, _NUCLEUS)
        # A row keeps the first ones of its order: where it drops one of these it keeps none behind them.
        truncates = (top_k < vocab) | (top_p < 1) | (min_p > 0)
        if not (keep[..., -1] & truncates[:, None]).any():
            return torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, index, keep)
    keep, index = _kept(probs, top_k, top_p, min_p, most)
    return torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, index, keep)


def _kept(probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the ``most`` largest of each row which survive, and their ids; both ``(B, R, most)``."""
    ordered, index = _ordered(probs, most)
    # float64: a float32 scan rounds by its shape on CUDA, and the edge of the nucleus would move with the batch.
    before = torch.cumsum(ordered, dim=-1, dtype=torch.float64) - ordered
    rank = torch.arange(ordered.shape[-1], device=probs.device)
    # Rounded probabilities may add up to more than 1; top-p 1 keeps the tail behind that point too.
    keep = (before <= top_p[:, None, None]) | (top_p[:, None, None] >= 1)
    keep &= rank < top_k[:, None, None].clamp(min=1)
    keep &= ordered >= ordered[..., :1] * min_p[:, None, None]
    keep[..., 0] = True
    return keep, index


def target_scores(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Log-probabilities each row is to be sampled from.

    Args:
        logits: ``(B, R, V)`` float32, MASK already at -inf, biases and penalties already added.
        rows: the requests' parameters.

    Returns:
        ``(B, R, V)`` float32: normalised log p with -inf outside the support. For a greedy request the logits
        themselves: only their argmax is read, and normalising could merge two near values into a tie.
    """
    if not rows.any_sampled:
        return logits
    scores = torch.log_softmax(logits / rows.temperature[:, None, None], dim=-1)
    if rows.any_truncated:
        keep = support(scores.exp(), rows.top_k, rows.top_p, rows.min_p, rows.largest_top_k, rows.min_p_only)
        truncated = (rows.top_k < logits.shape[-1]) | (rows.top_p < 1) | (rows.min_p > 0)
        # Normalising twice moves last bits: a request that truncates nothing must not notice a batch-mate that does.
        renormalised = torch.log_softmax(scores.masked_fill(~keep, float("-inf")), dim=-1)
        scores = torch.where(truncated[:, None, None], renormalised, scores)
    return torch.where(rows.greedy[:, None, None], logits, scores) if rows.any_greedy else scores


def choice(scores: torch.Tensor, rows: SamplingRows, g: torch.Tensor) -> torch.Tensor:
    """The token of each row, ``(B, R)`` int64: the argmax for a greedy request, the Gumbel-max draw with the noise ``g`` ``(B, R, V)`` for
    others. ``scores`` as of :func:`target_scores`."""
    if rows.any_greedy:
        g = torch.where(rows.greedy[:, None, None], 0.0, g)
    return best(scores + g)


def best(scores: torch.Tensor) -> torch.Tensor:
    """The argmax of each row, ``(..,)`` int64 of ``(.., V)`` float32; of equal values the first."""
    # On a host torch's own goes number by number, by all its threads.
    if noise.on_host(scores) and (scores.numel() <= _FEW or torch.get_num_threads() <= _THREADS):
        return torch.from_numpy(numpy.asarray(scores.numpy().argmax(-1)))
    return scores.argmax(-1)
