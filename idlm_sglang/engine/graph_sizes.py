"""Which decode forwards are captured: strides, batch sizes, and the rows of the largest."""

from collections.abc import Sequence

from sglang.srt.runtime_context import get_exec

from idlm_sglang.config import Settings, handed_down
from idlm_sglang.isd.stride import ladder

# Rows of the largest captured forward. Larger batches keep the device busy for longer than the host takes to launch them; and the
# logits of all graphs share one float32 buffer of so many rows.
MOST_ROWS = 2048
# A batch is padded by so much at most, where the list of sizes allows it.
_PADDING = 0.25


def captured_strides(settings: Settings) -> tuple[int, ...]:
    """Strides with graphs, the most wanted first: the one to begin with, single steps, then others that the controller chooses or, with a
    larger ``max_stride``, requests are meant to ask for, widest first."""
    others = ladder(settings.max_stride) if settings.auto or settings.max_stride > settings.stride else ()
    return tuple(dict.fromkeys((settings.stride, 1, *reversed(others))))


def batch_sizes(asked: Sequence[int], typed: bool, most: int, width: int) -> list[int]:
    """Batch sizes to capture at one stride, ascending, perhaps none.

    Args:
        asked: SGLang's list, or the user's.
        typed: the user's; all of it is kept that fits.
        most: requests that run at a time at most.
        width: rows per request.
    """
    fit = min(most, MOST_ROWS // width)
    sizes = sorted({size for size in asked if size <= fit} | ({fit} if fit and max(asked) > fit else set()))
    if typed or not sizes:
        return sizes
    kept = sizes[:1]
    while kept[-1] < sizes[-1]:
        behind = [size for size in sizes if size > kept[-1]]
        kept.append(max((size for size in behind if size <= (1 + _PADDING) * (kept[-1] + 1)), default=behind[0]))
    return kept


def sizes_of(model_runner, stride: int) -> list[int]:
    """Batch sizes to capture at this stride."""
    graph = get_exec().graph
    asked = graph.cuda_graph_config.decode.bs
    typed = bool(graph.cuda_graph_bs_decode)
    return batch_sizes(asked, typed, model_runner.req_to_token_pool.size, 2 * stride - 1)


def rows_of_logits(model_runner) -> int:
    """Rows of the largest forward to be captured."""
    return max(size * width for size, width in _largest(model_runner))


def mask_bytes(model_runner) -> tuple[int, int]:
    """Bytes of the masks of captured branch rounds, and of what is read for padding requests behind them.

    For as many columns as the KV pool has: only requests that share prefixes have more together, and their step runs eagerly then.
    """
    columns = model_runner.req_to_token_pool.req_to_token.shape[1]
    found = _largest(model_runner)
    sizes = [width * min(size * columns, model_runner.max_total_num_tokens) for size, width in found]
    # A padding request has one committed column.
    return max(sizes), max(size * width * (1 + width) for size, width in found)


def _largest(model_runner) -> list[tuple[int, int]]:
    """Of each stride to be captured, the largest batch size and the rows per request."""
    return [(max(sizes_of(model_runner, stride), default=0), 2 * stride - 1) for stride in captured_strides(handed_down())]
