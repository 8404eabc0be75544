"""What a request may ask for, and what it gets: decided once, from the request alone."""

import logging
import math

from idlm_sglang.config import COUPLED, Settings
from idlm_sglang.engine.requests import (
    REFUSED,
    SELFCHECK,
    SELFCHECK_PARAM,
    SINGLE,
    STRIDE_PARAM,
    STRIDED,
    RequestPlan,
    derived_seed,
    next_number,
)
from idlm_sglang.engine.trace import TRACE_PARAM

logger = logging.getLogger(__name__)

# Choices of one prompt; OpenAI's own limit is 128.
MAX_CHOICES = 1024
_TOP_K_MAX = 2**31 - 1
# A bias beyond this turns into inf or NaN when a logit or 1 / temperature is applied in float32.
_BIAS_MAX = 1e30
# The largest number of float16.
_EMBEDDING_MAX = 65504.0


def _asked(req, name: str):
    """A field of ``custom_params`` as given, or None. ``/generate`` lets ``custom_params`` be of any type."""
    params = req.sampling_params.custom_params
    return params.get(name) if isinstance(params, dict) else None


def _beyond_range(params) -> tuple[str, str] | None:
    """Numbers over which SGLang's own scheduler ends, or that leave float32."""
    if params.top_k > _TOP_K_MAX:
        return "top_k", f"top_k={params.top_k} is not valid; allowed: up to {_TOP_K_MAX}"
    for token, bias in (params.logit_bias or {}).items():
        if not -_BIAS_MAX <= float(bias) <= _BIAS_MAX:
            return "logit_bias", f"logit_bias of token {token} is {bias}; allowed: {-_BIAS_MAX:g} to {_BIAS_MAX:g}"
    return None


def _why_refused(req, settings: Settings | None) -> tuple[str, str] | None:
    beyond = _beyond_range(req.sampling_params)
    if beyond is not None or settings is None:
        return beyond
    if req.return_hidden_states:
        return "hidden_states", "return_hidden_states is not available with --speculative-algorithm ISD"
    if req.lora_id is not None:
        return "lora", "per-request LoRA adapters are not available with --speculative-algorithm ISD"
    if req.return_sampling_mask:
        return "sampling_mask", "return_sampling_mask is not available with --speculative-algorithm ISD"
    params = req.sampling_params
    if (params.beam_width or 1) > 1:
        return "beam_search", "beam_width (beam search) is not available with --speculative-algorithm ISD"
    if params.custom_params is not None and not isinstance(params.custom_params, dict):
        return "custom_params", f"custom_params is a {type(params.custom_params).__name__}; allowed: an object"
    stride = _asked(req, STRIDE_PARAM)
    if stride is not None and (isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= settings.max_stride):
        return "stride", f"custom_params.{STRIDE_PARAM}={stride!r} is not valid; allowed: an integer from 1 to {settings.max_stride}"
    trace = _asked(req, TRACE_PARAM)
    if trace is not None and not isinstance(trace, bool):
        return "trace", f"custom_params.{TRACE_PARAM}={trace!r} is not valid; allowed: true, false"
    return None


def empty_prompt(req) -> str:
    """What is wrong with a prompt of no tokens, or nothing: there is no row whose logits would begin the answer.

    Args:
        req: SGLang's ``TokenizedGenerateReqInput``. A session goes on behind what it holds; media and embeddings are no tokens.
    """
    other = req.input_embeds is not None or req.mm_inputs is not None or req.session_id is not None or req.session_params is not None
    return "" if other or req.input_ids is None or len(req.input_ids) else "the prompt has no tokens; allowed: a prompt of at least one token"


def outside_vocabulary(req, size: int) -> str:
    """What a request names that the vocabulary of ``size`` tokens has not, or nothing.

    Args:
        req: SGLang's ``TokenizedGenerateReqInput``. Media stand in it as ids of their own, beyond the vocabulary.
    """
    if req.return_logprob and req.top_logprobs_num > size:
        return f"{req.top_logprobs_num} candidates per token are asked for; allowed: up to {size}, the size of the vocabulary"
    if req.input_ids and req.mm_inputs is None:
        for token in (min(req.input_ids), max(req.input_ids)):
            if not 0 <= token < size:
                return f"token {token} is not in the vocabulary; allowed: 0 to {size - 1}"
    return ""


def unfit_embeddings(req, width: int) -> str:
    """What is wrong with the embeddings that a request brings, ``(prompt tokens, width)``, or nothing.

    Args:
        req: SGLang's ``TokenizedGenerateReqInput``.
        width: the model's hidden size.
    """
    if req.input_embeds is None:
        return ""
    if not req.input_embeds:
        return "input_embeds is empty; allowed: an embedding for each token of the prompt"
    for row, values in enumerate(req.input_embeds):
        if len(values) != width:
            return f"embedding {row} of input_embeds has {len(values)} values; allowed: {width}, the model's hidden size"
        # NaN in the model ends AR's sampler, and would stay in the KV pool. A sum is finite only where all that is in it is.
        if not (max(max(values), -min(values)) <= _EMBEDDING_MAX and math.isfinite(sum(values))):
            return f"embedding {row} of input_embeds has a value that is not finite or too large; allowed: -{_EMBEDDING_MAX:g} to {_EMBEDDING_MAX:g}"
    return ""


def refusal(req, settings: Settings | None) -> tuple[str, str] | None:
    """Why a request cannot be served, as (one word for a metric label, message for the client), or None.

    Args:
        req: SGLang's ``TokenizedGenerateReqInput`` or ``Req``.
        settings: the server's; None in plain AR serving.
    """
    try:
        return _why_refused(req, settings)
    except Exception as error:
        # An exception here would end the scheduler: whatever the request holds, it is the request that ends.
        logger.exception("idlm: a request could not be read")
        return "unreadable", f"the request's parameters could not be read: {error}"


def unreadable_processor(req) -> tuple[str, str] | None:
    """As :func:`refusal`. SGLang reads the processor, which may be anything a client sent, where an exception ends the scheduler."""
    if not req.custom_logit_processor:
        return None
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    try:
        CustomLogitProcessor.from_str(req.custom_logit_processor)
    except (Exception, SystemExit) as error:
        return "custom_logit_processor", f"custom_logit_processor cannot be read: {type(error).__name__}: {error}"
    return None


def _has_grammar(req) -> bool:
    fields = ("json_schema", "regex", "ebnf", "structural_tag")
    return req.grammar is not None or any(getattr(req.sampling_params, field, None) is not None for field in fields)


def _single_reason(req, settings: Settings | None) -> str | None:
    """Why a request decodes one token per step: its target depends on state that drafts do not carry."""
    if req.custom_logit_processor:
        return "custom_logit_processor"
    if settings is not None and not settings.strided_grammars and _has_grammar(req):
        return "grammar"
    return None


def plan_request(req, settings: Settings | None, server_seed: int) -> RequestPlan:
    """The plan of a new request.

    Args:
        req: SGLang's ``Req``.
        settings: the server's; None in plain AR serving, where only a client's seed matters.
        server_seed: SGLang's ``random_seed``, the same on every TP rank.
    """
    number = next_number()
    client_seed = req.sampling_params.sampling_seed
    seed = derived_seed(server_seed, number) if client_seed is None else int(client_seed)
    refused = None
    if settings is not None:
        refused = refusal(req, settings) or unreadable_processor(req)
    stride = _asked(req, STRIDE_PARAM)
    if refused is not None:
        mode, (reason, message) = REFUSED, refused
    else:
        reason, message = _single_reason(req, settings), ""
        mode = SINGLE if reason else STRIDED
        reason = reason or ("stride" if stride is not None else "default")
        if _asked(req, SELFCHECK_PARAM):
            reason = SELFCHECK
    coupled = client_seed is not None or (settings is not None and settings.sampling_rule == COUPLED)
    # Only the engine's own counting knows where tokens came from: nothing to trace in plain AR serving.
    trace = settings is not None and mode != REFUSED and _asked(req, TRACE_PARAM) is True
    return RequestPlan(number, mode, reason, stride, seed, coupled, message, trace)


def defuse(req) -> None:
    """Make a refused request harmless: SGLang still runs one token of it, and builds a batch from its parameters."""
    params = req.sampling_params
    params.top_k, params.logit_bias, params.custom_params = 1, None, None
    req.custom_logit_processor = None


def plan_of(req, settings: Settings | None, server_seed: int) -> RequestPlan:
    """The request's plan, made at its first sight."""
    plan = getattr(req, "idlm_plan", None)
    if plan is None:
        plan = plan_request(req, settings, server_seed)
        req.idlm_plan = plan
    return plan
