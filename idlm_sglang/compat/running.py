"""What the running server was started with."""

from idlm_sglang.config import ALGORITHM


def is_isd() -> bool:
    """Whether this process serves with ISD; False in AR serving with the plugin loaded."""
    from sglang.srt.runtime_context import get_spec

    return get_spec().speculative_algorithm == ALGORITHM
