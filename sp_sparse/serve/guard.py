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

# Where a request keeps its `_Body`.
_BODY = "sp_sparse.body"

_METHODS = ("GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS")


class Guard:
    """ASGI middleware: Host and Origin, API key, requests at once, size of the body, slow clients, counting."""

    def __init__(self, app: App, limits: Limits, metrics: Metrics, api_key: str | None, host: str) -> None:
        """`host` is the name or address that the server listens on."""
        self._app, self._limits, self._metrics = app, limits, metrics
        self._key = None if api_key is None else api_key.encode()
        self._host = host.lower()
        self._serving = 0
        self._held = 0  # bytes of all bodies that came, or are about to

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

        body = _Body(self)
        scope[_BODY] = body
        counts = not scope["path"].startswith("/health")
        self._serving += counts
        try:
            headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
            self._check(scope, headers)
            body.hold(int(headers.get("content-length", b"0")))
            await self._app(scope, self._bounded(receive, body), counted)
        except ApiError as error:
            await self._refuse(error.response(), scope, receive, counted)
        except (_SlowClientError, ClientDisconnect) as gone:
            # Nothing can be told any more; uvicorn closes the connection.
            status = 408 if isinstance(gone, _SlowClientError) else 499
        finally:
            self._serving -= counts
            body.let_go()
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
        name = _host_name(host)
        if name is None:
            raise ApiError(400, f"Host {host!r} is neither a name nor an address; send one", "invalid_host")
        if self._key is None and not self._is_own_name(name):
            # A page elsewhere may point a name of its own at this machine (DNS rebinding).
            text = f"Host {host!r} is not this server's; use its address, or start it with an API key to use a name"
            raise ApiError(403, text, "unknown_host")
        origin = headers.get("origin")
        if origin is not None and _origin_host(origin.decode("latin-1")) != host.lower():
            raise ApiError(403, "pages of other sites may not use this server", "foreign_origin")
        if self._key is not None and path.startswith("/v1/") and not self._has_key(headers):
            text = "the API key is missing or wrong; send it as `Authorization: Bearer …`"
            raise ApiError(401, text, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self._serving > self._limits.requests and not path.startswith("/health"):
            text = f"{self._limits.requests} requests are being served; try again soon"
            raise ApiError(429, text, "too_many_requests", headers={"Retry-After": "1"})
        if int(headers.get("content-length", b"0")) > self._limits.body_bytes:  # h11 lets nothing but digits through
            raise self._too_large()

    def _is_own_name(self, name: str) -> bool:
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

    def hold(self, bytes_: int) -> None:
        """Room for so many bytes of bodies.

        Raises:
            ApiError: there is none.
        """
        if self._held + bytes_ > self._limits.bodies_bytes:
            text = (
                f"requests of {self._held} bytes are being read, of {self._limits.bodies_bytes} at most, and this one has "
                f"{bytes_} more; try again soon"
            )
            raise ApiError(429, text, "too_many_bytes", headers={"Retry-After": "1"})
        self._held += bytes_

    def let_go(self, bytes_: int) -> None:
        self._held -= bytes_

    def _bounded(self, receive: Receive, body: _Body) -> Receive:
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
            body.hold(received)
            return message

        return bounded

    async def _in_time(self, sending: Awaitable[None]) -> None:
        try:
            await asyncio.wait_for(sending, self._limits.body_s)
        except (TimeoutError, asyncio.TimeoutError):
            raise _SlowClientError from None


class _Body:
    """The bytes that one request is counted with."""

    def __init__(self, guard: Guard) -> None:
        self._guard, self._bytes = guard, 0

    def hold(self, bytes_: int) -> None:
        """So many in all, unless it is counted with more already: what is announced counts before it comes."""
        if bytes_ > self._bytes:
            self._guard.hold(bytes_ - self._bytes)
            self._bytes = bytes_

    def let_go(self) -> None:
        self._guard.let_go(self._bytes)
        self._bytes = 0


def hold_body(scope: Scope, bytes_: int) -> None:
    """Count a request with so many bytes at least.

    Raises:
        ApiError: there is no room for them.
    """
    body: _Body = scope[_BODY]
    body.hold(bytes_)


def body_is_done(scope: Scope) -> None:
    """The body of a request is not in memory any more, though it is still being answered."""
    body: _Body = scope[_BODY]
    body.let_go()


def _host_name(host: str) -> str | None:
    """The name or address in a Host header; None if there cannot be one."""
    try:
        parts = urlsplit(f"//{host}")
        parts.port  # noqa: B018  raises for one that is none
        return parts.hostname or ""
    except ValueError:
        return None


def _origin_host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


class _SlowClientError(Exception):
    """A client does not take its answer."""
