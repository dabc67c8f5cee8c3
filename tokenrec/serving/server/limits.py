"""Limits of the server's endpoints."""

from __future__ import annotations

import dataclasses

from tokenrec.serving.request import Limits

_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class AppLimits:
    """Limits of requests and of the time that they may take.

    Attributes:
      request: limits of the content of a request.
      body_bytes: bytes of a body.
      total_body_bytes: bytes of all bodies that are being read.
      inline_bytes: bodies up to this size are parsed on the event loop.
      body_seconds: time in which a body must arrive.
      answer_seconds: time in which a request is answered; a caller may ask for less.
      stuck_seconds: time after which a device call counts as stuck.
    """

    request: Limits = dataclasses.field(default_factory=Limits)
    body_bytes: int = 16 * _MIB
    total_body_bytes: int = 256 * _MIB
    inline_bytes: int = 64 * 1024
    body_seconds: float = 10.0
    answer_seconds: float = 30.0
    stuck_seconds: float = 60.0
