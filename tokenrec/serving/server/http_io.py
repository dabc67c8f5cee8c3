"""Read the body of a request within limits, and write an answer: the edges of ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import Any

type Scope = MutableMapping[str, Any]
type Message = MutableMapping[str, Any]
type Receive = Callable[[], Awaitable[Message]]
type Send = Callable[[Message], Awaitable[None]]

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"


class HttpError(Exception):
    """An answer that is no success.

    Attributes:
      status: HTTP status.
      kind: short name of the error, for programs.
      message: field, value, reason and remedy, for people.
      headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message
        self.headers = dict(headers or {})


class DisconnectedError(Exception):
    """The caller closed the connection before its request was whole."""


@dataclasses.dataclass(frozen=True)
class Response:
    """An answer.

    Attributes:
      body: its bytes.
      status: HTTP status.
      content_type: type of the body.
      headers: further headers.
    """

    body: bytes
    status: int = 200
    content_type: str = JSON
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


class BodyReader:
    """Read bodies within a size, a time, and a size of all that are read at once.

    Args:
      limit: bytes of one body.
      total: bytes of all bodies that are held at one time.
      seconds: time from the first to the last byte of a body.
    """

    def __init__(self, limit: int, total: int, seconds: float) -> None:
        self.limit, self.total, self.seconds = limit, total, seconds
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(self, scope: Scope, receive: Receive) -> AsyncIterator[bytearray]:
        """Yield the body of a request, which is held until the block ends.

        Raises:
          HttpError: it is too long (413), too slow (408), or there is no room (503).
          DisconnectedError: the caller went away.
        """
        length = header(scope, b"content-length")
        # The parser of the server has checked that it is a number.
        if length is not None and int(length) > self.limit:
            raise self._too_long(int(length))
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(self.seconds):
                    while await self._read_part(body, receive):
                        pass
            except TimeoutError:
                raise HttpError(
                    408,
                    "slow_body",
                    f"body: {len(body)} bytes came in {self.seconds:g} s, and more are "
                    "due; send the body at once",
                    {"connection": "close"},
                ) from None
            yield body
        finally:
            self._held -= len(body)

    async def _read_part(self, body: bytearray, receive: Receive) -> bool:
        """Append the next part of a body; return whether more is to come."""
        message = await receive()
        if message["type"] == "http.disconnect":
            raise DisconnectedError
        part = message.get("body", b"")
        if len(body) + len(part) > self.limit:
            raise self._too_long(len(body) + len(part))
        if self._held + len(part) > self.total:
            raise HttpError(
                503,
                "overloaded",
                f"body: requests of {self._held} bytes are being read already, and the "
                f"limit is {self.total}; try again",
                {"retry-after": "1", "connection": "close"},
            )
        body += part
        self._held += len(part)
        return bool(message.get("more_body", False))

    def _too_long(self, length: int) -> HttpError:
        return HttpError(
            413,
            "too_long",
            f"body: has {length} bytes or more, and the limit is {self.limit}; send "
            "fewer candidates or events",
            # What is left of the body is not read.
            {"connection": "close"},
        )


def header(scope: Scope, name: bytes) -> bytes | None:
    """Return the value of the first header of a name in lower case, or None."""
    headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
    return next((value for key, value in headers if key == name), None)


async def respond(send: Send, response: Response) -> None:
    """Send an answer."""
    headers = [
        (b"content-type", response.content_type.encode()),
        (b"content-length", str(len(response.body)).encode()),
        *(
            (name.encode(), value.encode("latin-1"))
            for name, value in response.headers.items()
        ),
    ]
    await send(
        {"type": "http.response.start", "status": response.status, "headers": headers}
    )
    await send({"type": "http.response.body", "body": response.body})
