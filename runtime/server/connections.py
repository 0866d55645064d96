"""One HTTP connection, with the limits that keep a bad client from what good ones need.

Uvicorn's own, with: a time within which a request's head must be whole, and an idle connection begin one (408); a limit
of the head's size (431); a limit of connections (the one idle for longest makes room, else 503); and a time within
which a client must take what is sent (its connection is cut, which ends its requests).
"""

from __future__ import annotations

import asyncio
import resource
import socket
import struct
import sys
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from .protocol import ApiError

MAX_HEAD_BYTES = 16 << 10
# nginx gives the head 60 s; a client that has connected has its request at hand
HEAD_TIMEOUT_S = 20.0
KEEP_ALIVE_S = 75
# with 64 KiB unsent: less than 1 KB/s
STALL_TIMEOUT_S = 60.0
MAX_CONNECTIONS = 16384
# of the process itself: libraries, logs, the replicas' sockets
_OTHER_FILES = 128
# the kernel would take up to 4 MB for each connection of a client that does not read
SEND_BUFFER_BYTES = 256 << 10
# a client that still sends gets a reset, and not the answer, from a socket that is closed at once
_LINGER_S = 2.0


def connection_limit() -> int:
    """How many connections this process may hold; its soft limit of open files rises as far as the hard one lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _OTHER_FILES
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    allowed = wanted if soft == resource.RLIM_INFINITY else min(wanted, soft)
    return max(16, allowed - _OTHER_FILES)


class Connection(H11Protocol):
    """A client's connection. Idle: no request of it is worked on, and none is whole.

    max_connections  of this process, set before its server listens
    idle             those that are idle, the one that has been so for longest first
    """

    max_connections: ClassVar[int] = MAX_CONNECTIONS
    idle: ClassVar[dict[Connection, None]] = {}

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        full = len(self.connections) >= self.max_connections and not self._make_room()
        super().connection_made(transport)
        if full:
            self._refuse(ApiError(503, f"the server has its {self.max_connections} connections: try again"))
            self.transport.close()
            return
        self._await_head()

    def _make_room(self) -> bool:
        """Close the connection that has been idle for longest; False: none is idle."""
        oldest = next(iter(self.idle), None)
        if oldest is None:
            return False
        del self.idle[oldest]
        self.connections.discard(oldest)
        oldest.transport.abort()
        return True

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        # on a connection kept alive the first bytes of the next head start its time
        if self._head_timer is None and self in self.idle:
            self._await_head()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._head_came()

    def _await_head(self) -> None:
        self.idle[self] = None
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _head_came(self) -> None:
        """A request is whole, or there will be none."""
        self.idle.pop(self, None)
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.conn.trailing_data == (b"", False):
            self.transport.close()
        else:
            self._refuse(ApiError(408, f"the head of the request did not come within {HEAD_TIMEOUT_S:.0f} s"))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            # closing waits for the client to take the rest, and a client that does not read never does
            self.loop.call_later(STALL_TIMEOUT_S, self._cut)
        elif self.cycle.response_complete:
            # else a request that had come already is worked on now
            self.idle[self] = None

    def _cut(self) -> None:
        """Close now, and let the kernel forget what the client has not taken."""
        connection = self.transport.get_extra_info("socket")
        if connection is not None and connection.fileno() >= 0:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls, inside its `except`, for what is no HTTP."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if status == 431:
            self._refuse(head_too_large())
        else:
            self._refuse(ApiError(status, f"this is no HTTP/1.1 request: {error or msg}"))

    def _refuse(self, error: ApiError) -> None:
        """Answer, and close once the client has had the time to read that."""
        self._head_came()
        self._refused = True
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = error.body()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            reason = STATUS_PHRASES[error.status]
            self.transport.write(
                b"".join(
                    self.conn.send(event) or b""
                    for event in (
                        h11.Response(status_code=error.status, headers=headers, reason=reason),
                        h11.Data(data=body),
                        h11.EndOfMessage(),
                    )
                )
            )
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.abort)

    def shutdown(self) -> None:
        if self.conn.our_state is h11.ERROR:
            self.transport.abort()
        else:
            super().shutdown()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self._cut()
        else:
            super().timeout_keep_alive_handler()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALL_TIMEOUT_S, self._cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reads_again()

    def _reads_again(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        self._reads_again()
        super().connection_lost(exc)


def head_too_large() -> ApiError:
    return ApiError(431, f"the head of the request is larger than {MAX_HEAD_BYTES:,} bytes")
