"""The routes of the live page, added to SGLang's app."""

import json
import math
from collections.abc import AsyncIterator
from typing import Any

from sglang.srt.entrypoints.openai.protocol import ErrorResponse, TokenizeRequest
from sglang.srt.managers.io_struct import GenerateReqInput
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from idlm_sglang.serving.live import PATH
from idlm_sglang.serving.live.ask import Mistake, asked
from idlm_sglang.serving.live.gate import Gate
from idlm_sglang.serving.live.history import KEPT, History
from idlm_sglang.serving.live.page import content, policy
from idlm_sglang.serving.live.tokens import TracedAnswer

_PRIVATE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def install(app, manager, settings) -> None:
    """Add the page, its figures and its decode view to SGLang's ``app``, which does not run yet.

    Args:
        manager: SGLang's ``TokenizerManager``.
        settings: the server's :class:`~idlm_sglang.config.Settings`.
    """
    history = History(manager.get_internal_state)
    live = Live(app, manager, history, settings.max_stride)
    app.router.routes += [
        Route(PATH, live.page, methods=["GET"]),
        Route(PATH + "/stats", live.stats, methods=["GET"]),
        Route(PATH + "/decode", live.decode, methods=["POST"]),
    ]
    app.add_middleware(Gate, first=history.start)


class Live:
    """The endpoints."""

    def __init__(self, app, manager, history: History, max_stride: int):
        self._app, self._manager, self._history, self._max_stride = app, manager, history, max_stride
        self._page = content()
        self._policy = policy(self._page)

    async def page(self, request: Request) -> Response:
        """The page itself: no data."""
        headers = {"Content-Security-Policy": self._policy, "Referrer-Policy": "no-referrer", **_PRIVATE}
        return Response(self._page, media_type="text/html", headers=headers)

    async def stats(self, request: Request) -> Response:
        """Samples behind ``since`` (seconds since the epoch; default: all that are kept)."""
        try:
            then = float(request.query_params.get("since", 0))
        except ValueError:
            then = math.nan
        if not math.isfinite(then):
            return _refused(Mistake(f"since={request.query_params['since']!r} is not valid; allowed: seconds since the epoch"))
        body = {"model": self._manager.served_model_name, "started": self._history.started, "kept": KEPT, "max_stride": self._max_stride}
        return JSONResponse(body | {"samples": self._history.since(then)}, headers=_PRIVATE)

    async def decode(self, request: Request) -> Response:
        """An answer as lines of JSON: ``tokens`` as they come, at last ``end`` or ``error``. The body is read by :func:`asked`."""
        try:
            body = asked(await _json(request), self._max_stride)
            if self._manager.tokenizer is None:
                raise Mistake("the server runs with --skip-tokenizer-init; allowed: a server with its tokenizer")
            obj = GenerateReqInput(input_ids=await self._prompt(body, request), stream=True, sampling_params=body["sampling_params"])
            answers = self._manager.generate_request(obj, request)
            # The first answer comes with the checks: what they refuse is an HTTP 400.
            first = await anext(answers)
        except ValueError as mistake:
            return _refused(mistake)
        lines = self._lines(TracedAnswer(self._manager.tokenizer), first, answers, obj.rid)
        background = self._manager.create_abort_task(obj)
        return StreamingResponse(lines, media_type="application/x-ndjson", headers=_PRIVATE, background=background)

    async def _prompt(self, body: dict, request: Request) -> list[int]:
        """Token ids of the prompt, by the server's own chat template where it is a chat."""
        given = {"messages": [{"role": "user", "content": body["prompt"]}]} if body["mode"] == "chat" else {"prompt": body["prompt"]}
        found = await self._app.state.openai_serving_tokenize.handle_request(TokenizeRequest(model=self._manager.served_model_name, **given), request)
        if isinstance(found, ErrorResponse) or not hasattr(found, "tokens"):
            text = getattr(found, "message", None) or json.loads(found.body).get("message", "the prompt cannot be tokenized")
            raise Mistake(text)
        if not found.tokens:
            raise Mistake("prompt has no tokens; allowed: at least one")
        return found.tokens

    async def _lines(self, traced: TracedAnswer, answer: dict, answers: AsyncIterator[dict], rid: str) -> AsyncIterator[bytes]:
        ended = False
        try:
            while True:
                tokens = traced.see(answer)
                if tokens:
                    yield _line({"tokens": tokens})
                finish = answer["meta_info"]["finish_reason"]
                if finish:
                    meta = answer["meta_info"]
                    end = {"finish_reason": finish["type"], "completion_tokens": meta["completion_tokens"], "forwards": traced.forwards}
                    end |= {"rest": traced.rest(), "seed": meta.get("seed")}
                    if finish["type"] == "abort":
                        end["message"] = _one_line(finish.get("message") or "the server ended the answer")
                    ended = True
                    yield _line({"end": end})
                    return
                answer = await anext(answers)
        except ValueError as mistake:
            yield _line({"error": {"message": _one_line(mistake)}})
        except StopAsyncIteration:
            yield _line({"error": {"message": "the answer has no end"}})
        finally:
            # The client has gone: SGLang's own task would wait two seconds.
            if not ended:
                self._manager.abort_request(rid)


async def _json(request: Request) -> Any:
    try:
        return await request.json()
    except (ValueError, RecursionError):
        raise Mistake("the body is not JSON; allowed: an object with prompt") from None


def _refused(mistake: Exception) -> Response:
    return JSONResponse({"error": {"message": _one_line(mistake)}}, status_code=400, headers=_PRIVATE)


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())[:500]


def _line(event: dict) -> bytes:
    return json.dumps(event, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
