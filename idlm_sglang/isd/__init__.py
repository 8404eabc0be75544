"""Introspective strided decoding (ISD) in plain torch: tensors in, tensors out, no serving engine.

Shapes: ``B`` requests, stride ``N``, ``K = N - 1`` drafts, step width ``W = 2N - 1``, vocabulary ``V``.
"""

from idlm_sglang.isd.layout import BRANCH, CHAIN, OFF, row_offsets, step_positions, step_tokens, visible_rows
from idlm_sglang.isd.step import StepOutcome, first_proposal, isd_step
from idlm_sglang.isd.target import SamplingRows, target_scores

__all__ = [
    "BRANCH",
    "CHAIN",
    "OFF",
    "SamplingRows",
    "StepOutcome",
    "first_proposal",
    "isd_step",
    "row_offsets",
    "step_positions",
    "step_tokens",
    "target_scores",
    "visible_rows",
]
