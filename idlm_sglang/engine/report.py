"""What an answer says about itself in ``meta_info``, beside what SGLang says."""

from idlm_sglang.engine.requests import REFUSED
from idlm_sglang.engine.trace import TRACE, trace_of

# The key under which the scheduler's report travels to the HTTP process.
REPORT = "idlm_report"


def reported_seed(req) -> int | None:
    """The seed that, sent with the same request, gives the same answer at any stride.

    None for a greedy answer, which needs none, and for a sampled one that no seed reproduces: an unseeded one under
    the rejection rule or in plain AR serving.
    """
    if req.sampling_params.top_k <= 1:
        return None
    plan = getattr(req, "idlm_plan", None)
    if plan is None or plan.mode == REFUSED or not plan.coupled:
        return None
    return plan.seed


def report(req) -> dict:
    """The keys to add to the ``meta_info`` of a chunk of ``req``'s answer; of a trace, what is new since the chunk before."""
    seed = reported_seed(req)
    found = {} if seed is None else {"seed": seed}
    figures = getattr(req, "idlm_figures", None)
    if figures is not None and req.finished():
        found |= figures.as_meta_info()
    trace = trace_of(req)
    if trace is not None:
        found[TRACE] = trace.new(len(req.output_ids_through_stop))
    return found
