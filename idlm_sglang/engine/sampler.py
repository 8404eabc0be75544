"""SGLang's sampler with token-keyed noise for seeded requests.

Prefill and one-token-per-step decode choose here what the strided worker chooses by the coupled rule, from the same
ops (``engine.step_ops``), so that a seeded request reads the same at any stride. Batches without a seeded request take
SGLang's own path, but for their greedy requests: beside a sampled one, and when that one has gone, SGLang draws them from a
softmax with top-k 1, by an unstable sort. Of equal logits, frequent in bfloat16, another token then comes out than alone.
"""

import torch
from sglang.srt.layers.sampler import Sampler, _SamplingMaskCapture, _select_sampling_mask_rows

from idlm_sglang.engine.admission import plan_of
from idlm_sglang.engine.requests import server_seed
from idlm_sglang.engine.transfer import on_device
from idlm_sglang.engine.step_ops import StepOps
from idlm_sglang.isd.target import SamplingRows, best, host_flags


def give_seeds(batch, info) -> None:
    """Leave the noise keys of the batch's requests on ``info``, its ``SamplingBatchInfo``, where one of them has a seed, and what
    ``SamplingRows`` knows on the host beside them. A decode step of ISD gives its own (``engine.single``)."""
    info.idlm_seeds = info.idlm_flags = None
    # sampling_seed: --enable-deterministic-inference in AR serving, SGLang's own seeds, batch-mates included.
    if info.sampling_seed is not None or info.is_all_greedy:
        return
    info.idlm_flags = host_flags((p.top_k, p.top_p, p.min_p) for p in (req.sampling_params for req in batch.reqs))
    plans = [getattr(req, "idlm_plan", None) or plan_of(req, None, server_seed()) for req in batch.reqs]
    if not any(plan.coupled and req.sampling_params.top_k > 1 for plan, req in zip(plans, batch.reqs)):
        return
    info.idlm_seeds = on_device(torch.tensor([plan.seed for plan in plans], dtype=torch.int64), batch.device)


class TokenKeyedSampler(Sampler):
    """Draws by ``argmax(log p + g)``, g keyed by (seed, position, token id), when the batch carries ``idlm_seeds``."""

    # What a batch with keyed noise is drawn from, between the two calls of one sampling.
    _keyed: tuple[SamplingRows, torch.Tensor] | None = None
    # The largest of each row's logits where greedy requests go SGLang's way of sampling, likewise.
    _greedy: torch.Tensor | None = None
    # Logits without a watermark, of which log-probabilities are asked: SGLang preprocesses them, too, behind those it samples from.
    _unmarked: torch.Tensor | None = None

    def __init__(self, ops: StepOps):
        super().__init__()
        self._ops = ops

    def forward(self, logits_output, sampling_info, return_logprob, top_logprobs_nums, token_ids_logprobs, positions, *, logprob_logits=None):
        self._unmarked = None if logprob_logits is logits_output.next_token_logits else logprob_logits
        asked = return_logprob or sampling_info.sampling_mask_batch_indices is not None or logprob_logits is not None
        if asked or sampling_info.is_all_greedy or getattr(sampling_info, "idlm_seeds", None) is None:
            return super().forward(
                logits_output, sampling_info, return_logprob, top_logprobs_nums, token_ids_logprobs, positions, logprob_logits=logprob_logits
            )
        # Nothing but tokens is wanted: SGLang's probabilities, which it writes over the logits, would not be looked at.
        self._preprocess_logits(logits_output.next_token_logits, sampling_info)
        tokens, _ = self._sample_from_probs(None, sampling_info, positions, False)
        self._sync_token_ids_across_tp(tokens, sampling_info)
        return tokens

    def _preprocess_logits(self, logits, sampling_info):
        if self._unmarked is not None and logits is self._unmarked:
            self._unmarked = None
            return super()._preprocess_logits(logits, sampling_info)
        logits = super()._preprocess_logits(logits, sampling_info)
        seeds = getattr(sampling_info, "idlm_seeds", None)
        # Here the logits are still logits; what _sample_from_probs is handed has been through a softmax, whose
        # logarithm differs from the strided worker's scores in the last bits.
        if seeds is not None and not sampling_info.is_all_greedy:
            rows = self._rows_of(sampling_info, seeds)
            self._keyed = rows, self._ops.keep(logits.float()[:, None], rows)
        elif self._keyed is not None:
            self._keyed = None
        flags = getattr(sampling_info, "idlm_flags", None)
        beside_sampled = self._keyed is None and not sampling_info.is_all_greedy and flags is not None and flags["any_greedy"]
        self._greedy = best(logits.float()) if beside_sampled else None
        return logits

    @staticmethod
    def _rows_of(info, seeds) -> SamplingRows:
        return SamplingRows(
            temperature=info.temperatures.view(-1),
            top_k=info.top_ks,
            top_p=info.top_ps,
            min_p=info.min_ps,
            seed=seeds,
            coupled=torch.ones_like(info.top_ks, dtype=torch.bool),
            any_sampled=True,
            any_rejection=False,
            **info.idlm_flags,
        )

    def _sample_from_probs(self, probs, sampling_info, positions, simple_sampling_case):
        if self._keyed is None:
            tokens, mask = super()._sample_from_probs(probs, sampling_info, positions, simple_sampling_case)
            greedy, self._greedy = self._greedy, None
            # A mask that was asked for holds the token drawn.
            if greedy is not None and mask is None:
                tokens = torch.where(sampling_info.top_ks <= 1, greedy.to(tokens.dtype), tokens)
            return tokens, mask
        (rows, kept), self._keyed = self._keyed, None
        tokens = self._ops.draw(kept, rows, positions.view(-1))
        masked = sampling_info.sampling_mask_batch_indices
        if masked is None:
            return tokens, None
        weights = _select_sampling_mask_rows(self._ops.probabilities(kept, rows), masked)
        return tokens, _SamplingMaskCapture(weights=weights, token_ids=None, selected_weight=None, batch_rows=masked)
