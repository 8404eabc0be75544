"""On PYTHONPATH this makes a server's acceptance biased, in every process it starts: drafts are kept too readily."""

from idlm_sglang.isd import noise, step, verify


def too_willing(scores, q, drafts, seeds, positions):
    u = noise.uniform(seeds, positions, noise.STREAM_ACCEPT)
    return 0.6 * u * verify.take(q, drafts) < verify.take(scores, drafts).exp()


step.accepted_by_rejection = too_willing
