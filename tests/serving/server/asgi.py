"""Call an ASGI application without a server."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from tokenrec.serving.server.http_io import Message, Receive, Send

JSON_TYPE = {"content-type": "application/json"}


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[str, str]:
        return self.json["error"]["kind"], self.json["error"]["message"]


async def call(
    app: Any,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    method: str | None = None,
    parts: Sequence[bytes] | None = None,
    disconnects: bool = False,
) -> Answer:
    """Send a request: `body` as JSON, or `parts` of bytes; None for a GET."""
    is_get = body is None and parts is None
    sent = list(parts if parts is not None else [json.dumps(body).encode()])
    messages: list[Message] = [
        {"type": "http.request", "body": part, "more_body": True} for part in sent
    ]
    if not disconnects:
        messages[-1]["more_body"] = False
    answered: list[Message] = []

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        if disconnects:
            return {"type": "http.disconnect"}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        answered.append(message)

    scope = {
        "type": "http",
        "method": method or ("GET" if is_get else "POST"),
        "path": path,
        "headers": [
            (name.encode(), value.encode())
            for name, value in (JSON_TYPE | (headers or {})).items()
        ],
    }
    checked_receive: Receive = receive
    checked_send: Send = send
    await app(scope, checked_receive, checked_send)
    if not answered:
        return Answer(0, {}, b"")
    start, end = answered
    fields = {name.decode(): value.decode() for name, value in start["headers"]}
    assert int(fields["content-length"]) == len(end["body"])
    return Answer(start["status"], fields, end["body"])


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; one that never comes is a failure and no endless test."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)
