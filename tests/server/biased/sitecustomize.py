"""On PYTHONPATH this makes a server's acceptance biased, in every process it starts: every draft is kept."""

import torch

from idlm_sglang.isd import step

step.accepted_by_rejection = lambda scores, q, drafts, seeds, positions: torch.ones_like(drafts, dtype=torch.bool)
