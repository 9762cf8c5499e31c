"""HTTP/1.1 protocol of the server: answers that no route gives, and limits on slow and on many connections.

uvicorn refuses malformed requests, and requests above its limit, in plain text. Here they are problems, like every
other error.
"""

import asyncio
import sys
from http import HTTPStatus
from typing import Any

import h11
from fastapi.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api.problems import problem_of, problem_response
from app.errors import BadRequest, CounterpartError, HeaderTooLarge, NotReady, TooManyConnections, UploadTooSlow

# Seconds for the head of a request. A slower connection is closed.
HEADER_SECONDS = 20.0
# Open connections of all callers. Further requests get status 503 at once.
MAX_CONNECTIONS = 4000
# Longest head of a request that is parsed in parts, in bytes.
MAX_HEADER_BYTES = 1 << 14
# Status that h11 proposes for a head longer than it accepts.
TOO_LARGE = 431


class HttpProtocol(H11Protocol):
    """Protocol that closes a connection whose request does not arrive, and answers every error with a problem."""

    _header_timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routes = self.app
        self.app = self._answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_header_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # IDLE: the head of a request is incomplete.
        if self.conn.their_state is not h11.IDLE:
            self._cancel_header_timer()
        elif self._header_timer is None:
            self._set_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_header_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP. uvicorn calls this while it handles the exception of h11."""
        del msg
        exception = sys.exception()
        hint = exception.error_status_hint if isinstance(exception, h11.RemoteProtocolError) else 400
        self._refuse(_header_too_large() if hint == TOO_LARGE else _not_http())

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, also if there are too many connections or the process ends."""
        if len(self.connections) > MAX_CONNECTIONS:
            await _to_response(_too_many_connections())(scope, receive, send)
            return
        started = False

        async def send_and_remember(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._routes(scope, receive, send_and_remember)
        except asyncio.CancelledError:  # the server ends, and this request takes too long
            if started:
                raise
            await _to_response(_stopping())(scope, receive, send)

    def _refuse(self, error: CounterpartError) -> None:
        """Send a problem without a request, and close the connection."""
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            response = _to_response(error)
            head = h11.Response(
                status_code=response.status_code, headers=response.raw_headers, reason=_phrase(response)
            )
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _set_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._close_if_idle)

    def _cancel_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _close_if_idle(self) -> None:
        self._header_timer = None
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            self._refuse(_head_too_slow())
        self.transport.close()


def _phrase(response: JSONResponse) -> bytes:
    return HTTPStatus(response.status_code).phrase.encode()


def _to_response(error: CounterpartError) -> JSONResponse:
    return problem_response(problem_of(error), {"Connection": "close"})


def _not_http() -> BadRequest:
    return BadRequest(
        "The request is not valid HTTP/1.1.",
        expected="a request line, header fields and a body of the announced length (RFC 9112).",
        advice="Use an HTTP library, and check the URL scheme: this port may expect http, not https.",
    )


def _header_too_large() -> HeaderTooLarge:
    return HeaderTooLarge(
        "The request line and the header fields are too long.",
        expected=f"at most {MAX_HEADER_BYTES >> 10} KiB.",
        advice="Send parameters in the query and the scan in the body.",
    )


def _head_too_slow() -> UploadTooSlow:
    return UploadTooSlow(
        f"The head of the request did not arrive within {HEADER_SECONDS:g} s.",
        expected="a request line and header fields without long breaks.",
        advice="Send the request again.",
    )


def _too_many_connections() -> TooManyConnections:
    return TooManyConnections(
        f"More than {MAX_CONNECTIONS} connections are open.",
        expected="fewer connections.",
        advice="Try again later (see Retry-After), and close connections that are not used.",
    )


def _stopping() -> NotReady:
    return NotReady(
        "The service stops, and the request is not finished.",
        expected="a running service.",
        advice="Send the request again when the service has started (see Retry-After).",
    )
