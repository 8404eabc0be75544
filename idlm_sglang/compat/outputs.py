"""What the scheduler looks for in an answer, and when it sends one on."""

import re
from collections.abc import Callable
from itertools import accumulate

from idlm_sglang.engine.stops import Unsearchable, searcher

_PLACES = "idlm_logprob_places"


def search_in_time(expression: str, text: str, flags: int = 0) -> bool | None:
    """What: ``re.search`` as ``schedule_batch`` sees it, which it asks for stop expressions behind every token, answers in time linear in the text.
    Why: ``re`` backtracks: ``(a+)+b`` takes twice as long for each further ``a``, and the scheduler serves nobody meanwhile.
    Guard: the module still has its own ``re``; answers are compared with those of ``re``, and expressions that could take long are sent to a server.
    Goes when: SGLang searches with an automaton.
    """
    try:
        return searcher(expression).found(text) or None
    except (Unsearchable, OverflowError) as why:
        # HTTP refuses these; for any other way in, SGLang ends the request over an invalid expression.
        raise re.error(str(why)) from why


def send_what_is_new(original: Callable, accumulator, *, req) -> None:
    """What: ``_GenerationStreamAccumulator.accept`` leaves out an unfinished request that has no token which was not sent.
    Why: a retracted request is streamed, too. Where scheduling overlaps it may have lost its place before its prefill's result was processed: SGLang then sends
    an event without tokens, ``/v1/completions`` gives the log-probabilities of an echoed prompt with the first event alone, and they are lost; the
    time to the first token ends there. In AR serving as well.
    Guard: the hook applied; a test retracts requests before their first token, another replays it on SGLang's own classes.
    Goes when: SGLang streams new tokens only.
    """
    if req.finished() or len(req.output_ids) > req.send_token_offset:
        original(accumulator, req=req)


def find_prompt_logprobs(processor, batch, result) -> None:
    """What: before ``process_batch_result_prefill`` the place of each request's log-probabilities among the batch's is noted, for :func:`own_prompt_logprobs`.
    Why: it takes all requests of the batch to find them, and the functions hooked there see one.
    Guard: with the hooks there.
    Goes when: with the hooks there.
    """
    if not (batch.return_logprob and processor.is_generation):
        return
    lengths = result.extend_input_len_per_req, result.extend_logprob_start_len_per_req
    if None not in lengths:
        counts = map(processor.logprob_result_processor.calculate_num_input_logprobs, batch.reqs, *lengths)
        setattr(result.logits_output, _PLACES, list(accumulate(counts, initial=0)))


def own_prompt_logprobs(original: Callable, processor, *, i: int, logits_output, logprob_pt: int, **others) -> int:
    """What: ``_apply_prefill_logprobs`` and ``_apply_chunked_prefill_logprobs`` take a request's log-probabilities from its own place.
    Why: SGLang counts the places while it hands them out, and leaves out a request that was retracted, or ended, before the prefill's result is processed.
    Those behind it get the log-probabilities of other prompts. In AR serving as well.
    Guard: the hooks applied; a server that retracts such requests, whose answers are AR's with them alone.
    Goes when: SGLang counts all requests of the batch.
    """
    places = getattr(logits_output, _PLACES, None)
    return original(processor, i=i, logits_output=logits_output, logprob_pt=logprob_pt if places is None else places[i], **others)


def keep_output(original: Callable, req) -> None:
    """What: ``Req.reset_for_retract`` keeps the output of a request with embeddings, as it keeps that of any other.
    Why: SGLang drops it and lets the answer begin again, behind what was already sent of it, with the old log-probabilities and a grammar that has gone on.
    The two runs differ where nothing fixes the draws. In AR serving as well.
    Guard: the hook applied; tests on SGLang's own classes, and on servers that retract such requests.
    Goes when: SGLang keeps the output.
    """
    embeds = req.input_embeds
    if embeds is None or not placed_by_row():
        original(req)
        return
    req.input_embeds = None
    try:
        original(req)
    finally:
        req.input_embeds = embeds


def embeds_by_row(_, batch) -> None:
    """What: after ``ScheduleBatch.prepare_for_extend`` embeddings that requests bring replace those of their own rows alone (``replace_embeds``); all
    other rows are embedded from their tokens.
    Why: SGLang takes a batch's embeddings for those of all its rows. A retracted request's output has none, nor has a request of text beside it: the
    forward then ends the scheduler. And it hands them on in bfloat16, over which a model of another type ends it, too. In AR serving as well.
    Guard: the hook applied; a server is asked for embeddings and text at a time.
    Goes when: SGLang embeds what has no embeddings.
    """
    if batch.input_embeds is None or not placed_by_row():
        return
    import torch

    from idlm_sglang.engine.transfer import on_device

    rows, first = [], 0
    for req, prefix, length in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
        if req.input_embeds is not None:
            rows.extend(range(first, first + min(length, len(req.input_embeds) - prefix)))
        first += length
    embeds, places = batch.input_embeds, on_device(torch.tensor(rows, dtype=torch.long), batch.device)
    if batch.replace_embeds is not None:
        # What SGLang itself replaces it replaces in the embeddings, too.
        free = ~torch.isin(places, batch.replace_positions)
        embeds = torch.cat((embeds[free], batch.replace_embeds.to(embeds.dtype)))
        places = torch.cat((places[free], batch.replace_positions))
    batch.input_embeds, batch.replace_embeds, batch.replace_positions = None, embeds, places


def placed_by_row() -> bool:
    """Not with pipeline parallelism, whose later stages have no table of embeddings."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().pp_size == 1
