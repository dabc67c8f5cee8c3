"""`tokenrec serve` on a real artifact, as a process that has no package of training."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serving")
pytest.importorskip("httptools", reason="needs the extra serving")
pytest.importorskip("orjson", reason="needs the extra serving")
pytest.importorskip("flatbuffers", reason="needs the extra serving")

from tests.serving.server.arithmetic_server import Running, running
from tests.serving.server.test_model_slot import point
from tokenrec.cli.main import main
from tokenrec.serving.live.state import LiveState
from tokenrec.serving.request import Limits, parse_request

SERVE = """
import sys

for name in ("flax", "optax", "orbax", "grain", "tensorflow", "tensorflow_datasets"):
    sys.modules[name] = None
from tokenrec.cli.entry import main

sys.exit(main())
"""


@contextlib.contextmanager
def served(model: Path, folder: Path) -> Iterator[Running]:
    flags = {
        "--model": model,
        "--port": 0,
        "--max-batch": 2,
        "--max-candidates": 8,
        "--compile-cache": folder / "compiled",
        "--events-dir": folder / "events",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    with running([sys.executable, "-c", SERVE, "serve", *words]) as server:
        yield server


def golden_of(artifact: Path) -> list[dict[str, Any]]:
    lines = (artifact / "golden.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def check_scores(server: Running, golden: dict[str, Any]) -> None:
    status, answer = server.ask("/v1/score", golden["request"])
    assert status == 200, answer
    found = np.stack(list(answer["scores"].values()), 1)
    np.testing.assert_allclose(found, golden["scores"], rtol=0, atol=1e-6)


def check_live_scores(
    server: Running, artifact: Path, golden: list[dict[str, Any]]
) -> None:
    """An event that is sent to the server is in the history that it keeps."""
    state = LiveState.open(artifact / "counters")
    request = next(row["request"] for row in golden if row["request"].get("history"))
    time_ms = state.last_time_ms + 1_000
    events = {name: values[-1:] for name, values in request["history"].items()}
    events |= {"time_ms": [time_ms], "event_id": ["one"]}
    events["user_id"] = [request["user"]["user_id"]]
    for sent, counts in enumerate(((1, 0), (0, 1))):
        status, answer = server.ask("/v1/events", {"events": events})
        assert status == 200, answer
        assert (answer["applied"], answer["repeated"]) == counts, sent
    asked = request | {"time_ms": time_ms + 1, "history": "live"}
    status, live = server.ask("/v1/score", asked)
    assert (status, live["history"]) == (200, "live"), live
    # The same, completed here and sent whole.
    state.receive(events)
    parsed = parse_request(asked | {"history": {}}, Limits())
    completed = dataclasses.asdict(state.complete(parsed))
    whole = json.loads(json.dumps(completed, default=lambda array: array.tolist()))
    status, answer = server.ask("/v1/score", whole)
    assert status == 200, answer
    assert answer["scores"] == live["scores"]
    assert whole["history"]["time_ms"][-1] == time_ms


def damage(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


def copied(artifact: Path, folder: Path) -> Path:
    # Real copies: a hard link would damage the artifact of other tests.
    subprocess.run(["cp", "-r", str(artifact), str(folder)], check=True)
    return folder


def last_load(server: Running) -> dict[str, Any]:
    """How the newest load ended; waits for the one that is due."""
    return server.ask("/v1/models")[1]["last_load"]


def test_serve_scores_as_predict_and_survives_a_damaged_artifact(
    artifact: Path, tmp_path: Path
) -> None:
    golden = golden_of(artifact)
    link = tmp_path / "current"
    point(link, copied(artifact, tmp_path / "first"))
    with served(link, tmp_path) as server:
        for row in [*golden[:12], *golden[:3]]:
            check_scores(server, row)
        check_live_scores(server, artifact, golden)
        # A weight with another bit, in an artifact that is whole otherwise. Its manifest
        # has other spaces: a copy of the model that serves would not be loaded.
        broken = copied(artifact, tmp_path / "broken")
        manifest = json.loads((broken / "manifest.json").read_text())
        (broken / "manifest.json").write_text(json.dumps(manifest))
        damage(broken, next(iter(manifest["params"].values())))
        point(link, broken)
        while (load := last_load(server))["name"] != "broken":
            assert server.process.poll() is None
            time.sleep(0.02)
        assert load["outcome"] == "failed"
        assert "is damaged or was changed" in load["error"]
        check_scores(server, golden[0])
        page = server.ask("/metrics")[1].decode()
        assert "tokenrec_compiles_since_ready 0\n" in page
        hits = re.search(r"^tokenrec_prefix_hits_total (\d+)$", page, re.MULTILINE)
        assert hits
        assert int(hits[1]) >= 4
        assert server.stop() == 0


def test_a_damaged_artifact_is_not_served_and_says_why(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(artifact, tmp_path / "model")
    damage(folder, "golden.jsonl")
    cache = ("--compile-cache", str(tmp_path / "compiled"))
    words = ["serve", "--model", str(folder), "--port", "0", *cache]
    assert main(words) == 2
    assert "golden.jsonl' is damaged or was changed" in capsys.readouterr().err
    assert main(["serve", "--model", str(tmp_path / "none"), *words[3:]]) == 2
    assert "there is no manifest.json in it" in capsys.readouterr().err
    assert main(["serve", "--model", "gs://bucket/model", *words[3:]]) == 2
    assert main([*words, "--queue", "0"]) == 2
    assert "--queue 0 serves nothing" in capsys.readouterr().err
