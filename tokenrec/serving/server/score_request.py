"""From the body of a request to what the batcher takes, and from results to the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Buffer, Callable
from typing import Any

import numpy as np
import orjson

from tokenrec.serving.request import BadRequest, Limits, Request, parse_request
from tokenrec.serving.retrieval_request import parse_retrieval
from tokenrec.serving.server.batch_plan import RETRIEVAL
from tokenrec.serving.server.http_io import ARROW, JSON, HttpError
from tokenrec.serving.server.model_slot import ServedModel

# Characters of a digest that name a model in a request; fewer could name two.
_MIN_DIGEST = 8

# How orjson begins to say that it has no memory: as if the body were at fault.
_NO_MEMORY = "Not enough memory"

# Memory that a byte of JSON may take while it is parsed: 12 in orjson's own buffer (found
# by trial), and 30 as a value, where the body is a list of empty objects: "{},".
_BYTES_OF_PARSING = 48

# A history of this value stands for the one that the server keeps.
LIVE = "live"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request that is ready for the batcher.

    Attributes:
      encoded: arrays of the model.
      candidates: C, candidates to score; 0 of a request for items.
      user: id of the user, "" without one.
      source: "live" if the server's own state gave the history, else "request".
    """

    encoded: Any
    candidates: int
    user: str
    source: str


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked at an endpoint.

    Attributes:
      objective: of the models that answer it.
      types: content types of its bodies.
      is_quick: short requests are encoded on the event loop. What a request for items
        leaves out is decided for every item, which may take longer.
      prepare: checks and encodes a request.
      answer: makes the body of the answer.
    """

    objective: str
    types: tuple[str, ...]
    is_quick: bool
    prepare: Callable[[Any, ServedModel, Limits], Prepared]
    answer: Callable[[Prepared, Any, bool, ServedModel], bytes]

    def check_model(self, model: ServedModel) -> None:
        """Refuse a model that answers another question.

        Raises:
          HttpError: it is one.
        """
        objective = model.scorer.objective
        if objective != self.objective:
            path = "/v1/retrieve" if objective == RETRIEVAL else "/v1/score"
            raise HttpError(
                409,
                "other_objective",
                f"path: '{model.path.name}' serves, whose objective is {objective}; use "
                f"{path}, or a server of a {self.objective} artifact",
                {"connection": "close"},
            )


def parse_json(body: Buffer) -> Any:
    """Parse a body as JSON.

    Raises:
      HttpError: it is none.
      MemoryError: there is no memory to parse it.
    """
    # orjson ends the process where there is no memory for a value: ask for it first.
    np.empty(_BYTES_OF_PARSING * memoryview(body).nbytes, np.uint8)
    try:
        return orjson.loads(body)  # type: ignore[arg-type, unused-ignore]
    except orjson.JSONDecodeError as error:
        if error.msg.startswith(_NO_MEMORY):
            raise MemoryError from None
        # The position alone: the text of the body stays out of answers and logs.
        where = f"line {error.lineno}, column {error.colno}"
        raise HttpError(
            400,
            "bad_json",
            f"body: is not JSON at {where}: {error.msg}; send one JSON object in UTF-8",
        ) from None


def prepare(value: Any, model: ServedModel, limits: Limits) -> Prepared:
    """Check a request, fill it from the live state if it asks for that, encode it.

    Args:
      value: the request as JSON was read.
      model: the model that will score it.
      limits: the most that a request may hold.

    Raises:
      BadRequest: the request cannot be scored.
      HttpError: it asks for another model, or for a live state that there is not.
    """
    is_live = _take_options(value, model)
    request = parse_request(value, limits)
    if is_live:
        request = model.live.complete(request)
    encoded = model.scorer.encode(request)
    source = LIVE if is_live else "request"
    return Prepared(encoded, encoded.candidates, _user(request), source)


def _take_options(value: Any, model: ServedModel) -> bool:
    """Take the fields that only the server reads out of a request.

    Returns:
      Whether the live state gives the history.

    Raises:
      BadRequest, HttpError: as `prepare`.
    """
    if not isinstance(value, dict):
        return False
    _check_model(value.pop("model", None), model)
    # Never guessed: a caller that forgets its history must not get another one.
    if not isinstance(value.get("history"), str) or value["history"] != LIVE:
        return False
    if model.live is None:
        raise no_counters("history")
    del value["history"]
    return True


def no_counters(field: str) -> HttpError:
    """Return the error of a request that needs a live state where there is none."""
    return HttpError(
        409,
        "no_counters",
        f"{field}: the artifact has no counters to keep up to date; send history and "
        "statistics with each request, or export a run that has them",
        {"connection": "close"},
    )


def answer(
    prepared: Prepared, scores: np.ndarray, was_held: bool, model: ServedModel
) -> bytes:
    """Return the JSON of the scores.

    Args:
      prepared: the request, of C candidates.
      scores: `[C, O] float32`.
      was_held: whether its prefix was in the store.
      model: the model that scored it.
    """
    names = [name.removeprefix("score_") for name in model.scorer.outputs]
    columns = np.ascontiguousarray(scores.T)
    return orjson.dumps(
        {
            "model": model.scorer.digest,
            "scores": dict(zip(names, columns, strict=True)),
            **_about(prepared, was_held),
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


def prepare_retrieval(value: Any, model: ServedModel, limits: Limits) -> Prepared:
    """Check a request for items, fill it from the live state, and encode it.

    Args and errors: as `prepare`.
    """
    is_live = _take_options(value, model)
    wanted = parse_retrieval(value, limits)
    if is_live:
        request = model.live.complete(wanted.request)
        wanted = dataclasses.replace(wanted, request=request)
    encoded = model.scorer.encode(wanted)
    source = LIVE if is_live else "request"
    return Prepared(encoded, 0, _user(wanted.request), source)


def answer_items(
    prepared: Prepared, found: Any, was_held: bool, model: ServedModel
) -> bytes:
    """Return the JSON of the items that were found, best first.

    Args:
      prepared: the request.
      found: `Retrieved`: n items and their scores.
      was_held: whether its prefix was in the store.
      model: the model that found them.
    """
    return orjson.dumps(
        {
            "model": model.scorer.digest,
            "items": found.items,
            "scores": found.scores,
            **_about(prepared, was_held),
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


def _about(prepared: Prepared, was_held: bool) -> dict[str, Any]:
    """What an answer says about its request."""
    unknown = prepared.encoded.unknown
    return {
        "unknown": {
            "items": list(unknown.rows),
            "history_items": unknown.history_items,
            "values": dict(unknown.values),
            "missing": dict(unknown.missing),
        },
        "history": prepared.source,
        "cache": "hit" if was_held else "miss",
    }


def _check_model(wanted: Any, model: ServedModel) -> None:
    if wanted is None:
        return
    if not isinstance(wanted, str) or len(wanted) < _MIN_DIGEST:
        raise BadRequest(
            "model: is not a digest of 8 or more characters; send the one that "
            "/v1/models names, or none"
        )
    if not model.scorer.digest.startswith(wanted):
        raise HttpError(
            409,
            "other_model",
            f"model: '{wanted[:64]}' does not serve, and '{model.scorer.digest}' does; "
            "leave the field out to take the model that serves",
        )


def _user(request: Request) -> str:
    user = request.user.get("user_id")
    # The type too: the user 7 is not the user "7".
    return "" if user is None else f"{type(user).__name__}:{user}"


SCORE = Question("ranking", (JSON, ARROW), True, prepare, answer)
RETRIEVE = Question(RETRIEVAL, (JSON,), False, prepare_retrieval, answer_items)
