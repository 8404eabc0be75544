"""Custom logit processors, whose code is a client's: one that fails ends its own requests."""

import logging
import weakref
from dataclasses import dataclass
from http import HTTPStatus

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What a request gives its processor, ``params``, and the request.

    SGLang carries the parameters row by row through its batches, and nothing else of a request.
    """

    params: object
    req: weakref.ref


class Guarded:
    """A processor that does not raise.

    Where it does, or gives back what are no logits of the same shape, its requests are asked one by one, and those over which it fails end
    as bad requests. Their logits stay what they were.
    """

    def __init__(self, processor):
        self._processor = processor

    def __call__(self, logits: torch.Tensor, asked: list[Asked]) -> torch.Tensor:
        """``(rows, V)`` logits of the rows of ``asked``."""
        try:
            return self._applied(logits, asked)
        except (Exception, SystemExit) as error:
            if len(asked) > 1:
                return torch.cat([self(row, [one]) for row, one in zip(logits.split(1), asked, strict=True)])
            _end(asked[0].req(), type(self._processor).__name__, error)
            return logits

    def _applied(self, logits: torch.Tensor, asked: list[Asked]) -> torch.Tensor:
        # Processors write into what they are given.
        result = self._processor(logits.clone(), [one.params for one in asked])
        if not isinstance(result, torch.Tensor):
            raise TypeError(f"a {type(result).__name__} came back; allowed: a tensor")
        if result.shape != logits.shape or result.device != logits.device:
            raise ValueError(f"{tuple(result.shape)} logits on {result.device} came back; allowed: {tuple(logits.shape)} on {logits.device}")
        return result


def _end(req, name: str, error: BaseException) -> None:
    if req is None or req.finished() or req.to_finish is not None:
        return
    message = f"custom_logit_processor {name} failed: {type(error).__name__}: {error}"
    logger.warning("idlm: request %s: %s", req.rid, message)
    req.to_finish = FINISH_ABORT(message, HTTPStatus.BAD_REQUEST, "BadRequestError")


def guard(info, reqs) -> None:
    """Guard the processors of a new ``SamplingBatchInfo`` and name the requests ``reqs`` of its rows to them."""
    if info.custom_logit_processor is None:
        return
    for entry in info.custom_logit_processor.values():
        entry.processor = Guarded(entry.processor)
    info.custom_params = [Asked(params, weakref.ref(req)) for params, req in zip(info.custom_params, reqs, strict=True)]
