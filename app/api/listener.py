"""Listening socket of the service, and the uvicorn server that accepts its connections."""

import asyncio
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from app.api.server import MAX_HEADER_BYTES, HttpProtocol
from app.errors import AddressUnavailable

KEEP_ALIVE_SECONDS = 15
BACKLOG = 1024


class Server(uvicorn.Server):
    """Server that announces its end, so that waiting callers get an answer.

    Parameters
    ----------
    config : uvicorn.Config
    on_stop : callable
        Called on the event loop when a signal stops the server.
    """

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._on_stop)


def open_listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Raises
    ------
    AddressUnavailable
    """
    listener: socket.socket | None = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # asyncio disables Nagle's algorithm only if the socket names its protocol.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise AddressUnavailable(
            f"The service cannot listen on {host}, port {port}: {error.strerror or type(error).__name__}.",
            expected="an address of this machine, and a port that no other program uses.",
            advice="Stop the other program, or choose another port with --port or COUNTERPART_PORT.",
        ) from None
    return listener


def run_server(app: ASGIApp, listener: socket.socket, on_stop: Callable[[], None], **options: Any) -> None:
    """Serve an application until a signal stops the process."""
    config = uvicorn.Config(
        app,
        http=HttpProtocol,
        ws="none",
        log_config=None,
        access_log=False,  # uvicorn's access log contains query strings
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        headers=[("X-Content-Type-Options", "nosniff")],
        **options,
    )
    Server(config, on_stop).run(sockets=[listener])
