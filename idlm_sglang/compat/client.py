"""SGLang's load generator, as `idlm bench` uses it: in this process, with what it knows of each request."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from idlm_sglang.config import SettingError

_PARAMETERS = ("input_requests", "outputs", "dur_s", "tokenizer", "backend", "accept_length", "plot_throughput")


def serve_load(argv: Sequence[str], look: Callable[[list[Any]], None]) -> tuple[dict[str, Any], list[Any], list[Any], Any]:
    """Run ``sglang.benchmark.serving`` with these words; its result, its outputs, its requests, its tokenizer.

    ``look`` sees the outputs first, and may raise: the generator's own figures fail where no answer is a success.

    What: its ``calculate_metrics`` and ``run_benchmark`` are wrapped for the run, and ``sys.argv`` is set for its parser.
    Why: the result leaves out when each request began and ended, and the command returns nothing.
    Guard: the parameters of the first are compared with those this was written for.
    Goes when: the result carries start time and latency of each request.

    Raises:
        SettingError: SGLang's function takes other parameters, or its parser refuses a word.
    """
    from sglang.benchmark import serving

    calculate, run, typed = serving.calculate_metrics, serving.run_benchmark, sys.argv
    found = tuple(inspect.signature(calculate).parameters)
    if found != _PARAMETERS:
        raise SettingError(f"sglang.benchmark.serving.calculate_metrics takes {found}; allowed: {_PARAMETERS}")
    seen: dict[str, Any] = {}

    def recorded(input_requests, outputs, *rest, tokenizer=None, **named):
        look(list(outputs))
        seen.update(requests=list(input_requests), outputs=list(outputs), tokenizer=tokenizer)
        return calculate(input_requests, outputs, *rest, tokenizer=tokenizer, **named)

    def returned(args):
        seen["result"] = run(args)

    serving.calculate_metrics, serving.run_benchmark, sys.argv = recorded, returned, ["sglang.benchmark.serving", *argv]
    try:
        serving.cli_main()
    finally:
        serving.calculate_metrics, serving.run_benchmark, sys.argv = calculate, run, typed
    return seen["result"], seen["outputs"], seen["requests"], seen["tokenizer"]
