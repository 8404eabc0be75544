"""Forwards on a GPU: which runner captures them, with what input, and how much room their attention has."""

from collections.abc import Callable

from idlm_sglang.compat.running import is_isd


def graphs_by_stride(result: type, _) -> type:
    """What: ``ModelRunner._decode_cuda_graph_runner_cls`` is ours under ISD.
    Why: SGLang's runner captures one width, without a verify input for a registered algorithm, and would replay it for single steps.
    Guard: the hook applied; the worker refuses any other runner; a test compares replays with eager steps.
    Goes when: SGLang asks a registered algorithm for its runners.
    """
    if not is_isd():
        return result
    from idlm_sglang.engine.graphs import DecodeGraphs

    return DecodeGraphs


def rows_of_graphs(original: Callable, runner) -> int:
    """What: ``ModelRunner.max_shared_logits_buffer_rows``, the size of the logits' buffer that all graphs share, is that of what is captured.
    Why: it is the largest batch at the largest stride, which is more than any of our graphs has.
    Guard: the hook applied; a runner asserts that its rows fit.
    Goes when: with the hook above.
    """
    if not is_isd():
        return original(runner)
    from idlm_sglang.engine.graph_sizes import rows_of_logits

    return rows_of_logits(runner)


def verify_input_of_dummies(result, spec_algorithm, custom_mask, num_tokens_per_req: int, is_draft_worker: bool):
    """What: ``create_dummy_verify_input`` gives ISD's dummy forwards (kernel warm-up, autotuning) a verify input.
    Why: it gives registered algorithms None, with which attention backends fail in a verify forward.
    Guard: the hook applied; a test asks it.
    Goes when: SGLang asks a registered algorithm for its input.
    """
    if result is not None or not is_isd() or is_draft_worker:
        return result
    from idlm_sglang.engine.spec_io import IsdVerifyInput

    return IsdVerifyInput(draft_token=None, positions=None, draft_token_num=num_tokens_per_req)


def room_behind_context(backend, *, resolved, **_) -> None:
    """What: ``_build_resolved_backend``'s Triton attention takes a request to have up to W columns more than the context.
    Why: where the lengths are on the device alone, the list of a forward's columns is sized by the context; a step behind one whose result is
    not known yet may begin some columns further, fewer than N,, and they would be written behind the list.
    Guard: the hook applied; a test on SGLang's own classes.
    Goes when: SGLang sizes the list by what a speculative step may have committed.
    """
    if not is_isd() or "triton" not in (resolved.prefill, resolved.decode):
        return
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    from idlm_sglang.config import handed_down

    for part in (backend, getattr(backend, "prefill_backend", None), getattr(backend, "decode_backend", None)):
        if isinstance(part, TritonAttnBackend):
            part.max_context_len += handed_down().max_width


def verify_runs_by_call(result: bool, mode) -> bool:
    """What: ``ForwardMode.is_cpu_graph``, which forwards a CPU's graph runner is asked about, holds for verify forwards, too.
    Why: SGLang asks it for DECODE only; with IDLM_DECODE_GRAPHS=on ours has both (``platform.calls``).
    Guard: the hook applied; no other runner exists on the CPU platform, whose ``--enable-torch-compile`` is refused.
    Goes when: SGLang asks a CPU's runner about every forward that it captures.
    """
    return result or mode.is_target_verify()
