"""Who may see the live page: the API key as a browser can send it, and no other website."""

import base64
import binascii
from collections.abc import Callable
from urllib.parse import quote

from idlm_sglang.serving.live import PATH

_CHALLENGE = (b"www-authenticate", b'Basic realm="idlm", charset="UTF-8"')
_REFUSED = b'{"error": {"message": "requests from other websites are refused; allowed: the page itself"}}'


class Gate:
    """ASGI middleware around SGLang's check of the API key, for the live page's paths alone.

    A browser that navigates cannot send a bearer token. It is asked for one by HTTP Basic authentication: the password is
    the key, the user name is ignored. Browsers send such credentials again by themselves, to whatever page asks; so
    requests that another website makes are refused here, key or not: by Fetch Metadata (``Sec-Fetch-Site``), which browsers send over
    https and on localhost, else by an ``Origin`` that is not this host.

    Args:
        app: what SGLang serves, its own check included.
        first: called with every request to any path (it starts what needs the server's event loop).
    """

    def __init__(self, app, first: Callable[[], None]):
        self._app, self._first = app, first

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            self._first()
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path == PATH or path.startswith(PATH + "/"):
                await self._ours(path, scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _ours(self, path: str, scope, receive, send) -> None:
        headers = dict(scope["headers"])
        site = headers.get(b"sec-fetch-site") or _site(headers)
        # Following a link to the page is no harm: it holds no data.
        visit = path == PATH and scope["method"] == "GET" and headers.get(b"sec-fetch-mode") == b"navigate"
        if site not in (b"none", b"same-origin") and not visit:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"application/json")]})
            await send({"type": "http.response.body", "body": _REFUSED})
            return
        key = _password(headers.get(b"authorization", b""))
        if key is not None:
            rest = [pair for pair in scope["headers"] if pair[0] != b"authorization"]
            scope = {**scope, "headers": [*rest, (b"authorization", b"Bearer " + key)]}

        async def challenging(message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 401:
                message = {**message, "headers": [*message.get("headers", ()), _CHALLENGE]}
            await send(message)

        await self._app(scope, receive, challenging)


def _site(headers: dict[bytes, bytes]) -> bytes:
    """What ``Origin`` says in the words of ``Sec-Fetch-Site``; a request without one is the user's own, or no browser's."""
    origin = headers.get(b"origin")
    if origin is None:
        return b"none"
    return b"same-origin" if origin.partition(b"://")[2] == headers.get(b"host") else b"cross-site"


def _password(authorization: bytes) -> bytes | None:
    """The password of a Basic ``Authorization`` header, None where it is another kind or broken."""
    scheme, _, value = authorization.partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        _, colon, password = base64.b64decode(value.strip(), validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return None
    # SGLang compares as text, which has to be ASCII: anything else is a wrong key, not an error.
    return quote(password, safe=bytes(range(0x20, 0x7F))).encode() if colon else None
