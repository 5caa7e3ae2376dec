"""What every request passes before the application sees it, and what no client may hold up."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from sp_sparse.serve.answers import ApiError
from sp_sparse.serve.limits import Limits
from sp_sparse.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_METHODS = ("GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS")


class Guard:
    """ASGI middleware: Host and Origin, API key, requests at once, size of the body, slow clients, counting."""

    def __init__(self, app: App, limits: Limits, metrics: Metrics, api_key: str | None, host: str) -> None:
        """`host` is the name or address that the server listens on."""
        self._app, self._limits, self._metrics = app, limits, metrics
        self._key = None if api_key is None else api_key.encode()
        self._host = host.lower()
        self._serving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await self._in_time(send(message))

        counts = not scope["path"].startswith("/health")
        self._serving += counts
        try:
            headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
            self._check(scope, headers)
            await self._app(scope, self._bounded(receive), counted)
        except ApiError as error:
            await self._refuse(error.response(), scope, receive, counted)
        except (_SlowClientError, ClientDisconnect) as gone:
            # Nothing can be told any more; uvicorn closes the connection.
            status = 408 if isinstance(gone, _SlowClientError) else 499
        finally:
            self._serving -= counts
            method = scope["method"] if scope["method"] in _METHODS else "other"
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.answered(method, route, status)

    @staticmethod
    async def _refuse(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
        # The rest of the body is not read: the connection cannot be used again.
        response.headers["Connection"] = "close"
        await response(scope, receive, send)

    def _check(self, scope: Scope, headers: dict[str, bytes]) -> None:
        path = scope["path"]
        host = headers.get("host", b"").decode("latin-1")
        if self._key is None and not self._is_own_name(host):
            # A page elsewhere may point a name of its own at this machine (DNS rebinding).
            text = f"Host {host!r} is not this server's; use its address, or start it with an API key to use a name"
            raise ApiError(403, text, "unknown_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc.lower() != host.lower():
            raise ApiError(403, "pages of other sites may not use this server", "foreign_origin")
        if self._key is not None and path.startswith("/v1/") and not self._has_key(headers):
            text = "the API key is missing or wrong; send it as `Authorization: Bearer …`"
            raise ApiError(401, text, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self._serving > self._limits.requests and not path.startswith("/health"):
            text = f"{self._limits.requests} requests are being served; try again soon"
            raise ApiError(429, text, "too_many_requests", headers={"Retry-After": "1"})
        length = headers.get("content-length", b"0")
        if length.isdigit() and int(length) > self._limits.body_bytes:
            raise self._too_large()

    def _is_own_name(self, host: str) -> bool:
        name = urlsplit(f"//{host}").hostname or ""
        if name in ("localhost", self._host):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _has_key(self, headers: dict[str, bytes]) -> bool:
        scheme, _, given = headers.get("authorization", b"").partition(b" ")
        assert self._key is not None
        return hmac.compare_digest(given.strip(), self._key) and scheme.lower() == b"bearer"

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request has more than {self._limits.body_bytes} bytes; send less", "body_too_large")

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` until the body is complete, within size and time; afterwards it only tells of disconnection."""
        received, complete = 0, False

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._limits.body_s)
            except (TimeoutError, asyncio.TimeoutError):
                text = f"no part of the request came for {self._limits.body_s:g} s; send it faster"
                raise ApiError(408, text, "request_timeout") from None
            received += len(message.get("body", b""))
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            if received > self._limits.body_bytes:
                raise self._too_large()
            return message

        return bounded

    async def _in_time(self, sending: Awaitable[None]) -> None:
        try:
            await asyncio.wait_for(sending, self._limits.body_s)
        except (TimeoutError, asyncio.TimeoutError):
            raise _SlowClientError from None


class _SlowClientError(Exception):
    """A client does not take its answer."""
