"""The benchmarks of items and of bodies compare what they measure."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serving")
pytest.importorskip("httptools", reason="needs the extra serving")
pytest.importorskip("orjson", reason="needs the extra serving")

from benchmarks import serving_bodies, serving_retrieval
from benchmarks.serving_process import ServerProcess
from tests.serving.server.arithmetic_retriever import ArithmeticRetriever
from tests.serving.server.arithmetic_server import started
from tests.serving.server.request_bodies import body_of, retrieval_body_of
from tests.serving.server.test_model_slot import write_artifact
from tokenrec.serving.request import Limits, parse_request
from tokenrec.serving.retrieval_request import parse_retrieval
from tokenrec.serving.server.score_request import parse_json


def golden_row(seed: int) -> dict[str, Any]:
    request = retrieval_body_of(seed)
    for name in ("exclude", "filter", "drop_seen"):
        request.pop(name, None)
    wanted = parse_retrieval(request | {"k": 10}, Limits())
    found = ArithmeticRetriever(1.0).expected(wanted)
    return {"request": request, "items": found.items, "scores": found.scores.tolist()}


def test_every_answer_is_checked_and_counted(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "items", 1.0, "retrieval")
    rows = [golden_row(seed) for seed in range(3)]
    with started(folder) as running:
        server = ServerProcess(running.process, running.port)
        row = serving_retrieval.measure(server, rows, 6, masks=False)
        assert (row["requests"], row["compiles"]) == (6, 0)
        assert row["hits"] == 0.5
        assert row["retrieve ms"] > 0
        masked = serving_retrieval.measure(server, rows, 3, masks=True)
        assert masked["hits"] == 1
        rows[1]["scores"] = rows[1]["scores"][::-1]
        with pytest.raises(RuntimeError, match="an answer differs"):
            serving_retrieval.measure(server, rows, 3, masks=False)


def test_bodies_of_both_types_are_read_and_compared() -> None:
    def encode(request: Any) -> Any:
        ids = np.asarray(request.candidates["item_id"])
        return SimpleNamespace(prefix={}, target_ids=ids, target_dense=ids * 0.5)

    encoder: Any = SimpleNamespace(encode=encode)
    bodies = [json.dumps(body_of(seed)).encode() for seed in range(2)]
    streams = [serving_bodies.arrow_stream(body_of(seed)) for seed in range(2)]
    times, one = serving_bodies.encode_timed(encoder, parse_json, bodies)
    assert times.shape == (3,)
    _, two = serving_bodies.encode_timed(
        encoder, lambda body: serving_bodies.parse_arrow(body, Limits()), streams
    )
    serving_bodies.check_equal(one, two)
    other = encode(parse_request(body_of(5), Limits()))
    with pytest.raises(RuntimeError, match="give other arrays"):
        serving_bodies.check_equal(one, [two[0], other])
