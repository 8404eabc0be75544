"""SGLang's sampler with token-keyed noise for seeded requests.

Prefill and one-token-per-step decode choose here what the strided worker chooses by the coupled rule, so that a seeded
request reads the same at any stride. Batches without a seeded request take SGLang's own path, untouched.
"""

import torch
from sglang.srt.layers.sampler import Sampler, _SamplingMaskCapture, _select_sampling_mask_rows

from idlm_sglang.isd import noise
from idlm_sglang.isd.target import support


class TokenKeyedSampler(Sampler):
    """Draws by ``argmax(log p + g)``, g keyed by (seed, position, token id), when the batch carries ``idlm_seeds``."""

    def _sample_from_probs(self, probs, sampling_info, positions, simple_sampling_case):
        seeds = getattr(sampling_info, "idlm_seeds", None)
        if seeds is None:
            return super()._sample_from_probs(probs, sampling_info, positions, simple_sampling_case)
        scores = probs.float().log()
        greedy = sampling_info.top_ks <= 1
        if not simple_sampling_case:
            keep = support(probs[:, None].float(), sampling_info.top_ks, sampling_info.top_ps, sampling_info.min_ps)
            scores = scores.masked_fill(~keep[:, 0], float("-inf"))
        g = noise.gumbel(seeds, positions.view(-1, 1), probs.shape[-1])[:, 0]
        tokens = torch.where(greedy, probs.argmax(-1), (scores + g).argmax(-1))
        rows = sampling_info.sampling_mask_batch_indices
        if rows is None:
            return tokens, None
        weights = _select_sampling_mask_rows(scores.exp(), rows)
        return tokens, _SamplingMaskCapture(weights=weights, token_ids=None, selected_weight=None, batch_rows=rows)
