"""HTTP/1.1 connections that a slow or greedy client cannot hold.

uvicorn closes connections that are idle between requests. It waits for ever for the rest
of a request line or of headers, and keeps headers of any length: here both have limits.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Bytes of the request line and the headers.
MAX_HEAD_BYTES = 32 * 1024

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


def limited_protocol(
    head_seconds: float, max_connections: int
) -> type[HttpToolsProtocol]:
    """Return the class of connections with these limits.

    Args:
      head_seconds: time from the start of a connection, or of a request on it, until
        its headers are whole.
      max_connections: connections at one time; more are closed at once.
    """

    class LimitedProtocol(HttpToolsProtocol):
        """A connection with limits on its headers."""

        _head_timer: asyncio.TimerHandle | None = None
        _head_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.abort()
            else:
                self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            # A byte between two requests ends uvicorn's own timer.
            if self.cycle is not None and self.cycle.response_complete:
                self._expect_head()
            if self._head_timer is not None:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._head_timer is not None and self._head_bytes > MAX_HEAD_BYTES:
                self.transport.write(_TOO_LARGE)
                self.transport.close()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._expect_head()

        def on_headers_complete(self) -> None:
            self._end_head()
            super().on_headers_complete()

        def _expect_head(self) -> None:
            if self._head_timer is None:
                self._head_bytes = 0
                self._head_timer = self.loop.call_later(
                    head_seconds, self.timeout_keep_alive_handler
                )

        def _end_head(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return LimitedProtocol
