"""SGLang's load generator, as `idlm bench` uses it: in this process, with what it knows of each request."""

import inspect
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from idlm_sglang.config import SettingError

_PARAMETERS = ("input_requests", "outputs", "dur_s", "tokenizer", "backend", "accept_length", "plot_throughput")


@dataclass
class Streamed:
    """What stood in the events of all streams, which the load generator does not look at.

    Attributes:
        errors: of error events behind HTTP 200.
        finished: answers by finish reason.
        usages: events that told an answer's length.
    """

    errors: list[str] = field(default_factory=list)
    finished: Counter = field(default_factory=Counter)
    usages: int = 0

    def see(self, event: Any) -> None:
        if not isinstance(event, dict):
            return
        if event.get("error"):
            error = event["error"]
            self.errors.append(str(error.get("message", error) if isinstance(error, dict) else error))
        for choice in event.get("choices") or []:
            if choice.get("finish_reason"):
                self.finished[choice["finish_reason"]] += 1
        if (event.get("usage") or {}).get("completion_tokens") is not None:
            self.usages += 1


class _Json:
    """The module ``json`` for the load generator: what it loads is shown to ``see``, too."""

    def __init__(self, see: Callable[[Any], None]):
        self._see = see

    def __getattr__(self, name: str) -> Any:
        return getattr(json, name)

    def loads(self, *args: Any, **kwargs: Any) -> Any:
        found = json.loads(*args, **kwargs)
        self._see(found)
        return found


def serve_load(argv: Sequence[str], look: Callable[[list[Any], Streamed], None]) -> tuple[dict[str, Any], list[Any], list[Any], Any, Streamed]:
    """Run ``sglang.benchmark.serving`` with these words; its result, outputs, requests and tokenizer, and what its streams said.

    ``look`` sees outputs and streams first, and may raise: the generator's own figures fail where no answer is a success.

    What: its ``calculate_metrics`` and ``run_benchmark`` are wrapped for the run, its ``json`` is watched, and ``sys.argv`` is set for its parser.
    Why: the result leaves out when each request began and ended; the command returns nothing; an error event behind HTTP 200 counts as
    a good answer, and one without ``usage`` as long as was asked for.
    Guard: the parameters of the first are compared with those this was written for; a run that saw no event of a stream is an error.
    Goes when: the result carries start time, latency, finish reason and usage of each request.

    Raises:
        SettingError: SGLang's function takes other parameters.
        SystemExit: its parser refuses a word, or it gives up.
    """
    from sglang.benchmark import serving

    calculate, run, typed = serving.calculate_metrics, serving.run_benchmark, sys.argv
    found = tuple(inspect.signature(calculate).parameters)
    if found != _PARAMETERS:
        raise SettingError(f"sglang.benchmark.serving.calculate_metrics takes {found}; allowed: {_PARAMETERS}")
    seen: dict[str, Any] = {}
    streamed = Streamed()

    def recorded(input_requests, outputs, *rest, tokenizer=None, **named):
        look(list(outputs), streamed)
        seen.update(requests=list(input_requests), outputs=list(outputs), tokenizer=tokenizer)
        return calculate(input_requests, outputs, *rest, tokenizer=tokenizer, **named)

    def returned(args):
        seen["result"] = run(args)

    serving.calculate_metrics, serving.run_benchmark, serving.json = recorded, returned, _Json(streamed.see)
    sys.argv = ["sglang.benchmark.serving", *argv]
    try:
        serving.cli_main()
    finally:
        serving.calculate_metrics, serving.run_benchmark, serving.json, sys.argv = calculate, run, json, typed
    return seen["result"], seen["outputs"], seen["requests"], seen["tokenizer"], streamed
