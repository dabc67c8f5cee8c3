"""Answers in JSON, errors among them, and the check of the type of a request."""

from __future__ import annotations

import logging
import traceback
from typing import Any

import orjson

from tokenrec.errors import InputError
from tokenrec.serving.server.batcher import DeadlineError, QueueFullError
from tokenrec.serving.server.http_io import HttpError, Response, Scope, header

_LOG = logging.getLogger("tokenrec.serving")


def json_response(value: Any) -> Response:
    """Return a successful answer."""
    return Response(orjson.dumps(value))


def check_type(scope: Scope, *known: str) -> str:
    """Return the type of a body; refuse those of other types, or compressed.

    A web page of another origin cannot send such a type without asking first, which the
    server does not answer: so no page that a user of this machine opens can post here.

    Args:
      scope: the request.
      known: types that the endpoint takes.

    Raises:
      HttpError: the request declares another type, or a compression.
    """
    given = (header(scope, b"content-type") or b"").split(b";")[0].strip().lower()
    kind = given.decode("latin-1")
    if kind not in known:
        raise HttpError(
            415,
            "wrong_type",
            f"Content-Type: is not {' or '.join(known)}; send that and say so",
            {"connection": "close"},
        )
    if (header(scope, b"content-encoding") or b"identity").lower() != b"identity":
        raise HttpError(
            415,
            "wrong_type",
            "Content-Encoding: is not identity; send the body without compression",
            {"connection": "close"},
        )
    return kind


def error_response(error: Exception) -> Response:
    """Return the answer that tells of an error: its kind, and a message.

    The message names the field, the value, the reason and the remedy.
    """
    match error:
        case HttpError():
            failure = error
        case InputError():
            failure = HttpError(400, "bad_request", str(error))
        case QueueFullError():
            failure = HttpError(
                429, "queue_full", str(error), {"retry-after": str(error.retry_after)}
            )
        case DeadlineError():
            failure = HttpError(
                504, "deadline", f"{error}; send fewer requests, or wait longer"
            )
        case OSError():
            # A journal of events on a full disk, for one. The caller keeps its events.
            _LOG.error("a file cannot be written: %s", error.strerror)
            failure = HttpError(
                503,
                "storage",
                f"server: {error.strerror}; make room where it keeps files, and send the "
                "request again",
                {"retry-after": "10"},
            )
        case MemoryError():
            _LOG.error("there is no memory for a request")
            failure = HttpError(
                503,
                "memory",
                "server: has no memory for the request; send it again later, or start the "
                "server with more memory or a smaller --cache-mb",
                {"retry-after": "10"},
            )
        case _:
            # Frames alone: the text of an error may hold values of the request.
            frames = "".join(traceback.format_tb(error.__traceback__))
            _LOG.error("internal error %s\n%s", type(error).__name__, frames)
            failure = HttpError(
                500,
                "internal",
                f"server: {type(error).__name__}; the request was not scored; report "
                "the error with the server's log",
            )
    body = {"error": {"kind": failure.kind, "message": failure.message}}
    return Response(orjson.dumps(body), failure.status, headers=failure.headers)
