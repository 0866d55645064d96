"""A small HTTP/1.1 client for streamed completions: what a replay needs, at little CPU per token.

The client shares the cores with the server it measures. For each event it takes the time and looks for a few bytes; no
JSON is parsed but that of the last event. An event costs 17 µs of CPU so, and 79 µs with httpx (40 streams, busy Zen 4,
2026-11-23).
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

MAX_ERROR_BYTES = 4096
_MAX_HEAD_BYTES = 64 << 10


@dataclass(slots=True)
class Stream:
    """One request and what came of it. Times are seconds of time.perf_counter(); NaN: never.

    token_s        when each event that carries tokens came
    output_tokens  what the server says in `usage`, else the number of these events
    error          None: it ended as it should
    """

    body: bytes
    sent_s: float = float("nan")
    token_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    error: str | None = None
    finished: bool = False


class Origin:
    """Where requests go, and the headers that go with them. Raises: ValueError: no http URL."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no http:// or https:// address")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        path = parts.path.rstrip("/")
        self._base = path.removesuffix("/v1")
        self._headers = f"Host: {parts.netloc.rpartition('@')[2]}\r\n"
        if api_key is not None:
            self._headers += f"Authorization: Bearer {api_key}\r\n"

    def get(self, path: str) -> bytes:
        return f"GET {self._base}{path} HTTP/1.1\r\n{self._headers}Connection: close\r\n\r\n".encode()

    def post(self, path: str, body: bytes) -> bytes:
        head = f"POST {self._base}{path} HTTP/1.1\r\n{self._headers}Content-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Connection(asyncio.Protocol):
    """One connection, used again for one request after the other."""

    def __init__(self, on_end: Callable[[Connection], None]) -> None:
        self._on_end = on_end
        self._transport: asyncio.Transport | None = None
        self.stream: Stream | None = None
        self.reusable = False
        self.unanswered = False  # the connection closed before a byte of the last answer
        self._buffer = bytearray()
        self._in_body = False
        self._status = 0
        self._left: int | None = None  # bytes to the end of the body or chunk; None: until the connection closes
        self._chunked = False
        self._event = b""
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    @property
    def closed(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def start(self, stream: Stream, request: bytes) -> asyncio.Future[None]:
        """Send a request; the future is done when its answer has ended, well or not."""
        assert self._transport is not None
        self.stream = stream
        self.reusable = False
        self._in_body = False
        self._event = b""
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        stream.sent_s = time.perf_counter()
        return self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if self.stream is None:
            return
        self._buffer += data
        if not self._in_body and not self._head():
            return
        if self._chunked:
            self._chunks(now_s)
            return
        part = bytes(self._buffer)
        self._buffer.clear()
        if self._left is not None:
            self._left -= len(part)
        self._part(part, now_s)
        if self._left is not None and self._left <= 0:
            self._end()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self.stream is not None:
            self.unanswered = not self._in_body and not self._buffer and self.stream.error is None
            if not self.stream.finished and self.stream.error is None:
                ended = self._in_body and not self._chunked and self._left is None
                if not ended:
                    self.stream.error = f"the connection closed early{'' if error is None else f' ({error})'}"
            self._end()

    def _head(self) -> bool:
        """Take the head of the answer, when it is whole."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_HEAD_BYTES:
                self._fail("an endless HTTP head")
            return False
        lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        status = lines[0].split(b" ", 2)
        if not lines[0].startswith(b"HTTP/1.") or len(status) < 2 or not status[1].isdigit():
            self._fail(f"no HTTP: {lines[0][:40]!r}")
            return False
        self._status = int(status[1])
        fields = (line.lower().partition(b":") for line in lines[1:])
        headers = {name.strip(): value.strip() for name, _, value in fields}
        self._chunked = headers.get(b"transfer-encoding") == b"chunked"
        length = headers.get(b"content-length")
        self._left = 0 if self._chunked else int(length) if length is not None and length.isdigit() else None
        self.reusable = headers.get(b"connection") != b"close" and (self._chunked or self._left is not None)
        self._in_body = True
        return True

    def _chunks(self, now_s: float) -> None:
        """Whole and partial chunks of the body (RFC 9112, section 7.1)."""
        buffer = self._buffer
        while self.stream is not None:
            if self._left:
                part = bytes(buffer[: self._left])
                del buffer[: len(part)]
                self._left -= len(part)
                self._part(part, now_s)
                if self._left:
                    return
            if buffer[:2] == b"\r\n":  # the end of the chunk before
                del buffer[:2]
            end = buffer.find(b"\r\n")
            if end < 0 or not buffer:
                return
            try:
                size = int(bytes(buffer[:end]).partition(b";")[0], 16)
            except ValueError:
                self._fail(f"no chunk: {bytes(buffer[:20])!r}")
                return
            if size == 0:
                if len(buffer) < end + 4:
                    return
                del buffer[: end + 4]
                self._end()
                return
            del buffer[: end + 2]
            self._left = size

    def _part(self, part: bytes, now_s: float) -> None:
        """A piece of the body: whole events are counted, the rest waits."""
        stream = self.stream
        assert stream is not None
        if self._status != 200:
            self._event = (self._event + part)[:MAX_ERROR_BYTES]
            return
        data = self._event + part if self._event else part
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._event = data.split(b"\n\n")
        for event in events:
            if b'"choices":[{' in event or b'"choices": [{' in event:
                stream.token_s.append(now_s)
            elif event.startswith(b"data:"):
                self._last_words(event[5:].strip(), stream)

    def _last_words(self, data: bytes, stream: Stream) -> None:
        if data == b"[DONE]":
            stream.finished = stream.error is None
            return
        try:
            plain = json.loads(data)
        except ValueError:
            stream.error = f"no JSON in an event: {data[:80]!r}"
            return
        if plain.get("error"):
            stream.error = str(plain["error"])[:200]
        elif plain.get("usage"):
            stream.output_tokens = int(plain["usage"].get("completion_tokens", 0))

    def _fail(self, error: str) -> None:
        if self.stream is not None and self.stream.error is None:
            self.stream.error = error
        self.close()

    def _end(self) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            if self._status != 200 and stream.error is None:
                text = self._event.decode(errors="replace").strip()
                stream.error = f"HTTP {self._status}: {text[:200]}" if self._status else "no answer"
            if stream.error is None and not stream.finished:
                stream.error = "the stream ended without [DONE]"
            stream.output_tokens = stream.output_tokens or len(stream.token_s)
        if self._done is not None and not self._done.done():
            self._done.set_result(None)
        self._on_end(self)


async def connect(origin: Origin, on_end: Callable[[Connection], None]) -> Connection:
    """Raises: OSError."""
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(
        lambda: Connection(on_end),
        origin.host,
        origin.port,
        ssl=origin.tls,
        server_hostname=origin.host if origin.tls else None,
    )
    return connection


async def fetch_json(origin: Origin, path: str, timeout_s: float) -> object:
    """GET a small JSON document. Raises: OSError, ValueError, TimeoutError."""
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(
            origin.host, origin.port, ssl=origin.tls, server_hostname=origin.host if origin.tls else None
        )
        try:
            writer.write(origin.get(path))
            data = await reader.read(4 << 20)
            while more := await reader.read(4 << 20):
                data += more
        finally:
            writer.close()
    head, _, body = data.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if status != [b"200"]:
        raise ValueError(f"GET {path}: HTTP {status[0].decode() if status else 'without a status'}: {body[:200]!r}")
    return json.loads(body[body.find(b"{") : body.rfind(b"}") + 1])
