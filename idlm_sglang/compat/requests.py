"""What becomes of a request: admission, seeds, penalties."""

import re
from collections.abc import Callable

from idlm_sglang.compat.running import is_isd
from idlm_sglang.config import ALGORITHM
from idlm_sglang.engine.stops import refused as unsearchable


def readable_expressions(original: Callable, params, tokenizer) -> None:
    """What: ``SamplingParams.normalize`` ends in a ValueError, a bad request, over a stop expression that Python cannot read.
    Why: the parser's own errors are none, and come to HTTP 500.
    Guard: the hook applied; a test sends one.
    Goes when: SGLang answers with 400.
    """
    try:
        original(params, tokenizer)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"stop_regex {params.stop_regex_strs!r} is not valid: {error}") from error


def refuse_in_http(tokenized, manager, obj, *_, **__) -> None:
    """What: after ``TokenizerManager._create_tokenized_object`` admission may refuse the request, as SGLang refuses bad ones.
    Why: from the scheduler a refusal comes too late for a stream, which has begun with HTTP 200. Prompts without tokens, token ids outside the
    vocabulary, more candidates per token than it has, and a ``top_k`` beyond an int32 are refused in AR serving, too: SGLang's scheduler ends itself
    over them; so are embeddings that are not of the model's width, stop expressions over which it would come to a standstill, and biases beyond float32.
    Guard: the hook applied; refusals are tested streamed and not.
    Goes when: with the hook above.
    """
    from sglang.srt.managers.io_struct import GenerateReqInput

    if not isinstance(obj, GenerateReqInput):
        return
    from idlm_sglang.config import handed_down
    from idlm_sglang.engine.admission import empty_prompt, outside_vocabulary, refusal, unfit_embeddings
    from idlm_sglang.engine.metrics import requests_counter
    from idlm_sglang.engine.requests import REFUSED

    config = manager.model_config
    wrong = empty_prompt(tokenized) or outside_vocabulary(tokenized, config.vocab_size) or unfit_embeddings(tokenized, config.hidden_size)
    if wrong := wrong or unsearchable(tokenized.sampling_params.stop_regex_strs):
        raise ValueError(wrong)
    refused = refusal(tokenized, handed_down() if is_isd() else None)
    if refused is None:
        return
    reason, message = refused
    if is_isd() and manager.enable_metrics:
        if not hasattr(manager, "idlm_requests"):
            manager.idlm_requests = requests_counter({"model_name": manager.served_model_name, "dp_rank": ""})
        manager.idlm_requests(mode=REFUSED, reason=reason).inc()
    raise ValueError(message)


def few_choices(_, obj, *__, **___) -> None:
    """What: after ``GenerateReqInput._handle_parallel_sampling`` a request for more than ``MAX_CHOICES`` choices, or for none, is refused.
    Why: SGLang makes some twenty lists of n entries before it looks at anything, so that ``n`` of 10^9 takes more memory than
    the machine has; and 10^5 choices, once queued, are in everyone's way.
    Guard: the hook applied; a test asks for too many, in AR serving, too.
    Goes when: SGLang limits n.
    """
    from idlm_sglang.engine.admission import MAX_CHOICES

    n = obj.parallel_sample_num
    if isinstance(n, (int, float)) and not 1 <= n <= MAX_CHOICES:
        raise ValueError(f"n={n} is out of range; allowed: 1 to {MAX_CHOICES}")


def admit(scheduler, req, is_retracted: bool = False) -> None:
    """What: ``Scheduler._add_request_to_queue`` first asks admission; a refused request ends as HTTP 400.
    Why: SGLang has no per-request hook for a registered algorithm, and an exception in the worker kills the server. A processor that cannot
    be read is refused in AR serving, too: there SGLang's scheduler ends over it.
    Guard: the hook applied; refusal tests.
    Goes when: ``CustomSpecAlgo`` gets a ``validate_request``, and SGLang reads processors where it can still refuse them.
    """
    if is_retracted or req.to_finish is not None or getattr(req, "idlm_plan", None) is not None:
        return
    from idlm_sglang.engine.admission import defuse, plan_of, refusal, unreadable_processor
    from idlm_sglang.engine.requests import REFUSED

    # None is asked for; SGLang would read it beside another request's.
    req.custom_logit_processor = req.custom_logit_processor or None
    if not is_isd():
        if wrong := unreadable_processor(req) or refusal(req, None):
            req.set_finish_with_abort(wrong[1])
            defuse(req)
            scheduler.init_req_max_new_tokens(req)
        return
    worker = scheduler.draft_worker
    plan = plan_of(req, worker.settings, worker.server_seed)
    if worker.metrics is not None:
        worker.metrics.request(plan.mode, plan.reason)
    if plan.mode == REFUSED:
        req.set_finish_with_abort(plan.message)
        defuse(req)
        scheduler.init_req_max_new_tokens(req)


def guard_processors(info, cls, batch, *_, **__) -> None:
    """What: after ``SamplingBatchInfo.from_schedule_batch`` a custom logit processor that raises, or gives back no logits, ends its own requests (HTTP 400).
    Why: its code is a client's; SGLang's scheduler ends over it, and the server with it. In AR serving as well.
    Guard: the hook applied; failing processors are sent to servers, alone and beside others.
    Goes when: SGLang ends the request.
    """
    from idlm_sglang.engine.processors import guard

    guard(info, batch.reqs)


def scores_without_generating(req) -> bool:
    """What: ``Req.is_prefill_only``, a property, is true for ``max_new_tokens`` 0 under ISD too.
    Why: SGLang switches it off for every speculative algorithm; ``/v1/score`` then reads the wrong positions. ISD runs a
    prefill as it is, and has nothing to lose there.
    Guard: the property is still one; scores are compared with AR.
    Goes when: SGLang asks the algorithm.
    """
    from sglang.srt.runtime_context import get_spec

    return req.sampling_params.max_new_tokens == 0 and get_spec().speculative_algorithm in (None, ALGORITHM)


def attach_seeds(forward_batch, cls, batch, model_runner, **_) -> None:
    """What: ``ForwardBatch.init_new`` leaves the rows' noise keys on ``sampling_info.idlm_seeds``, and what they truncate by beside it.
    Why: SGLang passes seeds to the sampler only under ``--enable-deterministic-inference``, and draws none of its own.
    Guard: the hook applied; seeded tests, and replays of unseeded answers at one token per step.
    Goes when: ``SamplingBatchInfo`` carries every request's seed.
    """
    from idlm_sglang.engine.sampler import give_seeds

    # In a decode step of ISD the worker has the seeds of its own.
    mode = forward_batch.forward_mode
    if batch.sampling_info is not None and not (is_isd() and (mode.is_decode() or mode.is_target_verify())):
        give_seeds(batch, batch.sampling_info)


def token_keyed_sampler(sampler, *_, **__):
    """What: ``create_sampler`` gives the stock sampler token-keyed noise for seeded batches.
    Why: the stock seeded draw depends on batch-mates and needs an op that CPU lacks.
    Guard: only an exact stock ``Sampler`` is replaced; a custom backend's is left alone.
    Goes when: SGLang's seeded sampling is keyed by token id.
    """
    from sglang.srt.layers.sampler import Sampler

    from idlm_sglang.config import handed_down
    from idlm_sglang.engine.sampler import TokenKeyedSampler
    from idlm_sglang.engine.step_ops import step_ops

    return TokenKeyedSampler(step_ops(handed_down().step_ops)) if type(sampler) is Sampler else sampler


def penalties_in_order(original: Callable, orchestrator, vocab_size: int, batch, penalizers) -> None:
    """What: ``BatchedPenalizerOrchestrator`` gets its penalizers in one order, additive ones first; under ISD it gets none.
    Why: it is given a set of classes, so that with the overlap schedule off a process applies a repetition penalty before
    or after the additive ones by chance. Under ISD the worker counts tokens on the device.
    Guard: the hook applied; penalties are compared with AR, two of a kind together.
    Goes when: SGLang gives it a list, and counts every token of a speculative step.
    """
    ordered = sorted(penalizers, key=lambda kind: (kind.is_multiplicative, kind.__name__))
    original(orchestrator, vocab_size, batch, () if is_isd() else ordered)
