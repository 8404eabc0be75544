"""What the running server was started with."""

from functools import cache

from idlm_sglang.config import ALGORITHM


def is_isd() -> bool:
    """Whether this process serves with ISD; False in AR serving with the plugin loaded."""
    return _spec()().speculative_algorithm == ALGORITHM


@cache
def _spec():
    # Hooks ask several times a step: an import statement in a function takes as long as all the rest of the answer.
    from sglang.srt.runtime_context import get_spec

    return get_spec
