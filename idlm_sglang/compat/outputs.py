"""What the scheduler looks for in an answer, and when it sends one on."""

import re
from collections.abc import Callable

from idlm_sglang.engine.stops import Unsearchable, searcher


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
    time to the first token ends there. And an answer to embeddings begins again behind a retraction: SGLang sends it twice. In AR serving as well.
    Guard: the hook applied; a test retracts requests before their first token, another replays both on SGLang's own classes.
    Goes when: SGLang streams new tokens only.
    """
    if req.finished() or len(req.output_ids) > req.send_token_offset:
        original(accumulator, req=req)


def begin_again(_, req) -> None:
    """What: after ``Req.reset_for_retract`` a request with embeddings, whose output SGLang drops there, has no log-probabilities of it any more,
    and its grammar and its reasoning begin anew.
    Why: they are kept, and the new output's come behind them. In AR serving as well.
    Guard: the hook applied; a test on SGLang's own class.
    Goes when: SGLang does so, or keeps the output.
    """
    if req.input_embeds is None:
        return
    if req.return_logprob:
        for name in ("token_logprobs", "top_logprobs", "token_ids_logprobs"):
            for kind in ("val", "idx"):
                setattr(req.logprob, f"output_{name}_{kind}", [])
    req.grammar, req.reasoning_tokens = req.grammar and req.grammar.copy(), 0
