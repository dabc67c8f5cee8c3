"""The load generator counts every request, and its bodies are requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serving")
pytest.importorskip("httptools", reason="needs the extra serving")
pytest.importorskip("orjson", reason="needs the extra serving")

from benchmarks.serving import closed_loop, make_bodies, measure, open_loop
from benchmarks.serving_process import ServerProcess
from tests.serving.server.arithmetic_server import started
from tests.serving.server.request_bodies import body_of
from tests.serving.server.test_model_slot import write_artifact


def test_loops_measure_every_request(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "model", 1.0)
    rows = [json.dumps({"request": body_of(seed), "scores": []}) for seed in range(4)]
    (folder / "golden.jsonl").write_text("\n".join(rows))
    bodies = make_bodies(folder, 20)
    assert [len(json.loads(b)["candidates"]["item_id"]) for b in bodies] == [20] * 4
    with started(folder) as server:
        process = ServerProcess(server.process, server.port)
        row = measure(
            process, "closed", lambda: closed_loop(server.port, bodies, 2, 0.3), False
        )
        assert row["requests"] > 0
        assert row["compiles"] == 0
        assert 0 < row["hits"] <= 1
        assert row["p50 ms"] <= row["p99 ms"]
        latencies = open_loop(server.port, bodies, rate=100, seconds=0.3)
        assert len(latencies) == 30
        page = server.ask("/metrics")[1].decode()
        answered = row["requests"] + 30
        assert f'path="/v1/score",status="200"}} {answered}\n' in page
        with pytest.raises(RuntimeError, match="400"):
            closed_loop(server.port, [b"{}"], 1, 0.1)
