"""The page: one HTML document with its style and scripts inside, which asks nobody else for anything."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
_STYLES, _SCRIPTS = ("page.css",), ("common.js", "figures.js", "decode.js")


@cache
def content() -> str:
    """The document."""
    page = (_HERE / "page.html").read_text(encoding="utf-8")
    for tag, names in (("style", _STYLES), ("script", _SCRIPTS)):
        text = "\n".join((_HERE / name).read_text(encoding="utf-8") for name in names)
        page = page.replace(f"<{tag}></{tag}>", f"<{tag}>{text}</{tag}>")
    return page


def policy(page: str) -> str:
    """The Content-Security-Policy under which nothing runs but what ``page`` holds, and nothing is asked but this server."""
    allowed = {tag: " ".join(f"'sha256-{_digest(text)}'" for text in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)) for tag in ("style", "script")}
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
