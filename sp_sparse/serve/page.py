"""The page at `/`: one static file that talks to the API."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Coroutine
from importlib.resources import files
from typing import Any

from fastapi.responses import HTMLResponse, Response


def page_response() -> Callable[[], Coroutine[Any, Any, Response]]:
    """A handler that answers with the page; only its own script and style may run in it."""
    text = files("sp_sparse.serve").joinpath("static/index.html").read_text(encoding="utf-8")
    script, style = (
        " ".join(_hash(found) for found in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
        for tag in ("script", "style")
    )
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; media-src 'self' blob:; "
        "img-src 'self' data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}

    async def page() -> Response:
        return HTMLResponse(text, headers=headers)

    return page


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
