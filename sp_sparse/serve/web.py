"""uvicorn in a thread of rank 0, so that GPU work and HTTP do not wait for one another."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

# What is used of uvicorn beside its interface: methods of the protocol, and what these classes keep.
_METHODS = ("connection_made", "connection_lost", "data_received")
_KEPT = ((H11Protocol, ("loop", "transport", "cycle")), (RequestResponseCycle, ("response_complete",)))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        OSError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise OSError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}); choose another --host or --port"
        ) from error


def check_uvicorn() -> None:
    """Whether this version has what is used of it.

    Raises:
        ValueError: with what is missing.
    """
    missing = [f"H11Protocol.{name}" for name in _METHODS if name not in vars(H11Protocol)]
    for kind, names in _KEPT:
        kept = kind.__init__.__code__.co_names
        missing += [f"{kind.__name__}.{name}" for name in names if name not in kept]
    if missing:
        raise ValueError(
            f"uvicorn {uvicorn.__version__} has no {', '.join(missing)}, by which slow clients are cut off; install a "
            'version that pip install "sp-sparse[serve]" takes'
        )


class WebServer:
    """Serves an application until it is closed."""

    def __init__(self, app: FastAPI, listener: socket.socket, header_s: float) -> None:
        """`header_s`: seconds that a client may take to send the headers of a request."""
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=_protocol(header_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=max(1, min(10, int(header_s))),
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="web", daemon=True
        )
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Answer what was asked, within bounds, and stop."""
        self._server.should_exit = True
        self._thread.join(timeout=10)


def _protocol(header_s: float) -> type[asyncio.Protocol]:
    class Deadlines(H11Protocol):
        """Ends connections on which no request comes, or whose client does not read: uvicorn itself waits for ever."""

        _deadline: asyncio.TimerHandle | None = None
        _looking: asyncio.TimerHandle | None = None
        _was_closing = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._deadline = self.loop.call_later(header_s, self._give_up)
            self._looking = self.loop.call_later(header_s, self._look)

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._deadline, self._looking):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def _look(self) -> None:
            if self._was_closing:  # close() waits for the client to read the rest, who has had time to
                self.transport.abort()
                return
            self._was_closing = self.transport.is_closing()
            self._looking = self.loop.call_later(header_s, self._look)

        def _give_up(self) -> None:
            self._deadline = None
            if self._is_idle() and not self.transport.is_closing():
                self.transport.close()

        def _is_idle(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._deadline is not None and not self._is_idle():
                self._deadline.cancel()
                self._deadline = None
            elif self._deadline is None and self._is_idle():
                self._deadline = self.loop.call_later(header_s, self._give_up)

    return Deadlines
