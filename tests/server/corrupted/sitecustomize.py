"""On PYTHONPATH this breaks a server's acceptance, in every process it starts: every valid draft is committed."""

from idlm_sglang.isd import step

valid_drafts = step.valid_drafts
kept = []


def remembered(counts, k):
    kept[:] = [counts]
    return valid_drafts(counts, k)


step.valid_drafts = remembered
step.leading = lambda accepted: kept[0]
