"""Where an answer ends, and what its grammar has seen by then."""

from collections.abc import Callable
from functools import partial

from idlm_sglang.compat.running import is_isd


def grammar_waits(result: bool, scheduler, batch, last_batch) -> bool:
    """What: ``Scheduler.is_disable_overlap_for_batch`` also waits before a mixed batch with a grammar.
    Why: it waits only before decode batches; a mixed one would sample with the automaton one token behind.
    Guard: the hook applied; grammars under overlap and mixed chunks are compared with AR.
    Goes when: the test in SGLang covers every batch that samples for a grammar request.
    """
    waiting = bool(batch) and batch.forward_mode.is_mixed() and batch.has_grammar and len(scheduler.result_queue) > 0
    return result or (is_isd() and waiting)


def grammar_behind_end(original: Callable, processor, req, tokens) -> list[int]:
    """What: ``_accept_grammar_tokens`` keeps a token that the grammar rejects, and leaves on the request that it did, and
    whether the grammar ended within these tokens.
    Why: AR looks for the end of the answer first and asks the grammar behind it; for a speculative run it is the other way
    round. A rejected token that ends the answer (forced by a custom processor, or where nothing else is allowed) is an
    answer there and an error here.
    Guard: the hook applied; such tokens, and ``ignore_eos`` behind a complete grammar, are compared with AR.
    Goes when: SGLang asks in AR's order.
    """
    if not is_isd():
        return original(processor, req, tokens)
    ended, asked = req.grammar.is_terminated(), req.to_finish
    retained = original(processor, req, tokens)
    if req.to_finish is not asked and len(retained) < len(tokens):
        retained.append(tokens[len(retained)])
        req.idlm_grammar_error, req.to_finish = req.to_finish, asked
    req.idlm_grammar_just_ended = not ended and req.grammar.is_terminated()
    return retained


def defer_reasoning(original: Callable, processor, req, tokens) -> None:
    """What: ``_maybe_update_reasoning_tokens`` counts an accepted run once its end is known.
    Why: it is asked before the search for the end, and counts what stands behind a stop.
    Guard: the hook applied; usage of reasoning requests with stops inside a run is compared with AR.
    Goes when: SGLang counts after the search.
    """
    if isinstance(tokens, list) and len(tokens) > 1 and is_isd():
        req.idlm_reasoning = partial(original, processor, req), tokens
    else:
        original(processor, req, tokens)


def finish_token_by_token(original: Callable, req, new_accepted_len: int = 1) -> None:
    """What: ``Req.update_finish_state`` sees an accepted run as AR would: one token after the other.
    Why: over a whole run it prefers a stop string to an end token in front of it, and the first stop string of the list to
    the first in the text; and a speculative run ends with its grammar, where AR adds one more token under ``ignore_eos``.
    Guard: the hook applied; stops in every order inside a run are compared with AR.
    Goes when: SGLang's own check does so.
    """
    grammar = req.grammar
    if getattr(req, "idlm_grammar_just_ended", False):
        req.grammar, req.idlm_grammar_just_ended = None, False
    try:
        _search_end(original, req, new_accepted_len)
    finally:
        req.grammar = grammar
        error = getattr(req, "idlm_grammar_error", None)
        if error is not None:
            req.idlm_grammar_error = None
            req.to_finish = req.to_finish if req.finished() else error
        count, run = getattr(req, "idlm_reasoning", None) or (None, None)
        if count is not None:
            req.idlm_reasoning = None
            beyond = 0 if req.finished_len is None else len(req.output_ids) - req.finished_len
            count(run[: len(run) - beyond])


def _search_end(original: Callable, req, new_accepted_len: int) -> None:
    params = req.sampling_params
    stops = params.stop_strs or params.stop_regex_strs
    if new_accepted_len <= 1 or not stops or req.finished() or req.to_finish is not None or not is_isd():
        original(req, new_accepted_len)
        return
    run = req.output_ids[-new_accepted_len:]
    del req.output_ids[-new_accepted_len:]
    for i, token in enumerate(run):
        req.output_ids.append(token)
        original(req, 1)
        if req.finished():
            # SGLang leaves the length open where the last token is the last of the answer; here more follow.
            req.finished_len = len(req.output_ids) if req.finished_len is None else req.finished_len
            req.output_ids.extend(run[i + 1 :])
            return
