"""The code of the example for Ray Serve, with a stand-in for Ray.

The stand-in has the names that the example imports. It makes a batch of each request,
and no process: test_ray_serve.py runs the example in Ray itself, where that is installed.
"""

from __future__ import annotations

import asyncio
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.serving.server.arithmetic_retriever import ArithmeticRetriever
from tests.serving.server.arithmetic_scorer import ArithmeticScorer
from tests.serving.server.request_bodies import body_of, request_of
from tokenrec.errors import InputError
from tokenrec.serving.request import BadRequest

EXAMPLE = Path(__file__).parents[2] / "launch" / "serving" / "ray_serve.py"
SCORER = ArithmeticScorer(1.5)


class JSONResponse:
    def __init__(self, content: Any, status_code: int = 200) -> None:
        self.content, self.status_code = content, status_code


def deployment(**options: Any) -> Any:
    def decorate(cls: type) -> type:
        cls.bind = classmethod(lambda cls, *values: (cls, values))  # type: ignore[attr-defined]
        return cls

    return decorate


def batch(**options: Any) -> Any:
    def decorate(method: Any) -> Any:
        async def one(self: Any, value: Any) -> Any:
            (result,) = await method(self, [value])
            return result

        return one

    return decorate


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names of the example, imported with the stand-in."""
    modules: dict[str, dict[str, Any]] = {
        "ray": {},
        "ray.serve": {
            "Application": object,
            "batch": batch,
            "deployment": deployment,
        },
        "starlette": {},
        "starlette.requests": {"Request": object},
        "starlette.responses": {"JSONResponse": JSONResponse},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["ray"].serve = sys.modules["ray.serve"]  # type: ignore[attr-defined]
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture
def ranker(example: dict[str, Any]) -> Any:
    return example["Ranker"](lambda path: SimpleNamespace(scorer=SCORER), "model")


def post(ranker: Any, value: Any) -> JSONResponse:
    class Http:
        async def json(self) -> Any:
            if isinstance(value, Exception):
                raise value
            return value

    return asyncio.run(ranker(Http()))


@pytest.mark.parametrize("has_prefix", [True, False])
def test_an_answer_holds_the_scores_of_the_scorer(
    ranker: Any, monkeypatch: pytest.MonkeyPatch, has_prefix: bool
) -> None:
    monkeypatch.setattr(SCORER, "has_prefix", has_prefix)
    answer = post(ranker, body_of(5)).content
    expected = SCORER.expected(request_of(5))
    assert answer["model"] == SCORER.digest
    found = [answer["scores"][task] for task in SCORER.tasks]
    np.testing.assert_array_equal(np.float32(found).T, expected)
    assert answer["unknown"] == {"items": []}


def test_a_request_that_cannot_be_scored_is_the_caller_s_error(ranker: Any) -> None:
    answer = post(ranker, body_of(5) | {"user": {"age": "old"}})
    assert answer.status_code == 400
    assert "user.age" in answer.content["error"]
    assert post(ranker, ValueError("secret")).content == {
        "error": "the body is not JSON"
    }
    with pytest.raises(BadRequest, match="'user' is missing"):
        asyncio.run(ranker.score({"time_ms": 1}))


def test_a_retrieval_artifact_is_refused(example: dict[str, Any]) -> None:
    finder = SimpleNamespace(scorer=ArithmeticRetriever())
    with pytest.raises(InputError, match="is of a retrieval run, which scores no"):
        example["Ranker"](lambda path: finder, "items")


def test_the_application_loads_as_the_server_does(example: dict[str, Any]) -> None:
    from tokenrec.serving.server.load_model import ModelLoader

    cls, (load, model) = example["build_app"]({"model": "/models/ranker/v1"})
    assert cls.__name__ == "Ranker"
    assert isinstance(load, ModelLoader)
    assert load.batch.batch == 16
    assert model == "/models/ranker/v1"
