"""Scores of an artifact: those of `predict`, alone or together, and what is refused."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tokenrec
from tests.serving.without_training import WITHOUT_TRAINING
from tests.worlds import one_device
from tokenrec import Config, DataConfig, ModelConfig, TokensConfig
from tokenrec.checkpoint.run_folder import OpenedRun
from tokenrec.cli.main import main
from tokenrec.data.dataset import open_dataset
from tokenrec.data.pipeline import task_names
from tokenrec.data.schema import MISSING, UNKNOWN, columns
from tokenrec.errors import InputError
from tokenrec.serving.export.requests import PredictedRequest, predicted_requests
from tokenrec.serving.export.run import export_run, write_artifact
from tokenrec.serving.request import BadRequest, Limits, parse_request
from tokenrec.serving.scorer import open_artifact
from tokenrec.state import build_model, init_state

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def scorer(artifact):
    scorer = open_artifact(artifact)
    # Few sizes: each is a program to compile.
    scorer.warm(batches=(1, 4), candidates=(8,))
    return scorer


@pytest.fixture(scope="module")
def golden(scorer):
    return list(scorer.artifact.golden())


def encode(scorer, request):
    return scorer.encode(parse_request(request, Limits()))


def near(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def with_history(golden):
    """A golden request with a history, to change; with two candidates."""
    request = copy.deepcopy(
        next(request for request, _ in golden if len(request.get("history", ())))
    )
    other = golden[0][0]["candidates"]
    request["candidates"] = {
        name: [values[0], other[name][0]]
        for name, values in request["candidates"].items()
    }
    return request


def test_golden_requests_have_the_scores_of_predict(
    exported_run, scorer, golden, tmp_path
):
    scores = scorer.score([encode(scorer, request) for request, _ in golden])
    for got, (_, expected) in zip(scores, golden, strict=True):
        near(got, expected)
    tokenrec.predict(exported_run[0], "test", tmp_path / "scores.parquet")
    rows = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    known = {(row["user_id"], row["item_id"], row["time_ms"]): row for row in rows}
    for request, expected in golden:
        for item, of_item in zip(
            request["candidates"]["item_id"], expected, strict=True
        ):
            row = known[request["user"]["user_id"], item, request["time_ms"]]
            near(of_item, [row[name] for name in scorer.outputs])


def test_a_request_alone_scores_as_with_others_and_in_slices(scorer, golden):
    requests = [with_history(golden), *(request for request, _ in golden[:4])]
    encoded = [encode(scorer, request) for request in requests]
    alone = [scorer.score([one])[0] for one in encoded[:2]]
    for one, together in zip(alone, scorer.score(encoded), strict=False):
        near(one, together)
    (prefix,) = scorer.prefill(encoded[:1])
    parts = scorer.extend([(prefix, encoded[0].part(i, i + 1)) for i in range(2)])
    near(np.concatenate(parts), alone[0][:2])
    assert encoded[0].part(0, 1).prefix_key == encoded[0].prefix_key
    assert prefix.nbytes == sum(array.nbytes for array in prefix.arrays.values())


def test_more_candidates_than_the_largest_program_are_scored_in_slices(
    artifact, golden
):
    scorer = open_artifact(artifact, check=False)
    assert scorer.warm(batches=(2,), candidates=(4,)) == 2
    request = with_history(golden)
    count = len(request["candidates"]["item_id"])
    expected = scorer.score([encode(scorer, request)])[0]
    for column in request["candidates"]:
        request["candidates"][column] = request["candidates"][column] * 5
    got = scorer.score([encode(scorer, request)] * 3)
    assert [len(scores) for scores in got] == [5 * count] * 3
    near(got[2], np.tile(expected, (5, 1)))
    # After `warm` nothing is compiled.
    assert scorer.compiles == 2


def test_only_the_newest_events_are_read(scorer, golden):
    request = with_history(golden)
    (expected,) = scorer.score([encode(scorer, request)])
    events = scorer.artifact.manifest["events"]
    request["history"] = {
        name: (values * events)[-len(values) :] if name == "time_ms" else values
        for name, values in request["history"].items()
    }
    older = {name: [values[0]] * events for name, values in request["history"].items()}
    padded = {name: older[name] + values for name, values in request["history"].items()}
    kept = {name: values[-events:] for name, values in padded.items()}
    near(
        scorer.score([encode(scorer, request | {"history": padded})])[0],
        scorer.score([encode(scorer, request | {"history": kept})])[0],
    )
    assert encode(scorer, request | {"history": padded}).events == events
    near(scorer.score([encode(scorer, request)])[0], expected)


def test_the_prefix_key_depends_on_user_and_history_alone(scorer, golden):
    request = with_history(golden)
    key = encode(scorer, request).prefix_key
    other = copy.deepcopy(request)
    other["candidates"]["item_id"] = other["candidates"]["item_id"][::-1]
    assert encode(scorer, other).prefix_key == key
    other["history"]["item_id"][-1] = "never seen"
    assert encode(scorer, other).prefix_key != key


def test_unseen_values_and_items_are_flagged(scorer, golden):
    request = with_history(golden)
    schema = scorer.artifact.schema
    feature = next(f for f in schema.group("row") if f.kind == "categorical")
    part = request["context"] if feature.name in request["context"] else None
    assert part is not None
    before = encode(scorer, request).unknown
    part[feature.name] = (
        987_654 if isinstance(part[feature.name], int) else "never seen"
    )
    request["candidates"]["item_id"][0] = "never seen"
    encoded = encode(scorer, request)
    column = columns(schema.state).ids[feature.name][0]
    assert (encoded.target_ids[:, column] == UNKNOWN).all()
    added = encoded.candidates
    assert (
        encoded.unknown.values[feature.name]
        == before.values.get(feature.name, 0) + added
    )
    assert (encoded.unknown.items, encoded.unknown.rows) == (1, (0,))
    part[feature.name] = None
    encoded = encode(scorer, request)
    assert (encoded.target_ids[:, column] == MISSING).all()
    assert encoded.unknown.missing[feature.name] >= added


def test_a_missing_column_is_an_error_unless_it_is_allowed(artifact, scorer, golden):
    request = with_history(golden)
    name, _ = request["context"].popitem()
    with pytest.raises(BadRequest, match=f"context.{name}: the column is missing"):
        encode(scorer, request)
    tolerant = open_artifact(artifact, check=False, allow_missing=(name,))
    request["context"][name] = None
    expected = encode(tolerant, request)
    del request["context"][name]
    got = encode(tolerant, request)
    np.testing.assert_array_equal(got.target_ids, expected.target_ids)
    with pytest.raises(InputError, match="feature 'wek' is not in the schema"):
        open_artifact(artifact, check=False, allow_missing=("wek",))


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("context", "weather", 1, "no column 'weather'"),
        ("user", "watch_ratio", 1, "no column"),
        ("candidates", "item_id", [3], r"candidates.item_id\[0\]: 3 is a int"),
    ],
)
def test_wrong_columns_are_named(scorer, golden, part, name, value, message):
    request = with_history(golden)
    if part == "candidates":
        value = value * len(request["candidates"]["item_id"])
    request[part][name] = value
    with pytest.raises(BadRequest, match=message):
        encode(scorer, request)


def test_a_file_of_requests_has_the_same_scores(artifact, golden, tmp_path, capsys):
    golden = golden[:4]
    requests = [request | {"history": request.get("history")} for request, _ in golden]
    pq.write_table(pa.Table.from_pylist(requests), tmp_path / "in.parquet")
    flags = ["--requests", str(tmp_path / "in.parquet")]
    flags += ["--out", str(tmp_path / "out.parquet"), "--model", str(artifact)]
    assert main(["score", *flags]) == 0
    assert "rows" in capsys.readouterr().out
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert table["request"] == [
        i for i, (_, scores) in enumerate(golden) for _ in scores
    ]
    expected = np.concatenate([scores for _, scores in golden])
    model = tokenrec.load(artifact)
    loaded = model.score([request for request, _ in golden[:4]])
    for i, name in enumerate(model.scorer.outputs):
        near(table[name], expected[:, i])
        near(loaded[0][name], np.array(golden[0][1])[:, i])
    assert all(table["known_item"])
    assert main(["score", *flags, "--allow-missing", "nothing"]) == 2


def test_a_wrong_line_of_a_file_is_named(artifact, golden, tmp_path, capsys):
    requests = [copy.deepcopy(request) for request, _ in golden[:3]]
    requests[2]["time_ms"] = -(1 << 40)
    pq.write_table(pa.Table.from_pylist(requests), tmp_path / "in.parquet")
    out = tmp_path / "out.parquet"
    flags = ["--requests", str(tmp_path / "in.parquet"), "--out", str(out)]
    assert main(["score", *flags, "--model", str(artifact)]) == 2
    assert "line 2: history.time_ms" in capsys.readouterr().err
    assert not out.exists()


def test_an_export_that_fails_leaves_nothing(
    exported_run, artifact, golden, tmp_path, monkeypatch
):
    wrong = [
        PredictedRequest(request, np.array(scores, np.float32) + 1)
        for request, scores in golden[:1]
    ]
    monkeypatch.setattr(
        "tokenrec.serving.export.run.predicted_requests", lambda *_: iter(wrong)
    )
    with pytest.raises(InputError, match="request 0 of 1 has a score that differs by"):
        export_run(exported_run[0], tmp_path / "model", platforms=("cpu",))
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="exists; name a new folder"):
        export_run(exported_run[0], artifact)
    with pytest.raises(InputError, match="--platforms: 'gpu'"):
        export_run(exported_run[0], tmp_path / "model", platforms=("gpu",))


def test_a_run_on_streams_scores_as_predict(exported_run, tmp_path):
    data = DataConfig(
        path=str(exported_run[0].parent / "data"),
        paradigm="uc",
        events=8,
        overlap=2,
        eval_batch_size=16,
    )
    model = ModelConfig(width=8, heads=1, layers=2, windows=(4,))
    config = Config(data=data, tokens=TokensConfig(embedding_dim=4), model=model)
    dataset = open_dataset(Path(data.path))
    mesh = one_device()
    with jax.set_mesh(mesh):
        spec = build_model(config, dataset.schema, task_names(dataset.schema, data))
        run = OpenedRun(spec, dataset, 0, init_state(spec, 0))
        predicted = list(predicted_requests(run, "test", mesh, 12))
    assert len(predicted) > 6
    assert any("history" in request for request, _ in predicted)
    manifest = write_artifact(run, "test", predicted, tmp_path, ("cpu",), TOLERANCE)
    assert manifest["events"] == 7
    assert len(list(open_artifact(tmp_path).artifact.golden())) == len(predicted)


def test_an_accelerator_keeps_prefixes_on_the_device(scorer, golden, monkeypatch):
    encoded = [encode(scorer, request) for request, _ in golden[:3]]
    expected = scorer.score(encoded)
    monkeypatch.setattr(scorer.programs, "on_host", False)
    prefixes = scorer.prefill(encoded)
    assert all(isinstance(array, jax.Array) for array in prefixes[0].arrays.values())
    got = scorer.extend(list(zip(prefixes, encoded, strict=True)))
    for one, other in zip(got, expected, strict=True):
        near(one, other)


def test_another_platform_is_named(artifact, monkeypatch):
    monkeypatch.setattr(
        "tokenrec.serving.scorer.program_platform", lambda device: "tpu"
    )
    with pytest.raises(InputError, match="exported for cpu, and this process"):
        open_artifact(artifact, check=False)


_ALONE = (
    WITHOUT_TRAINING
    + """
import json
from pathlib import Path
from tokenrec.serving.request import Limits, parse_request
from tokenrec.serving.scorer import open_artifact
scorer = open_artifact(Path(sys.argv[1]))
request, expected = next(scorer.artifact.golden())
(scores,) = scorer.score([scorer.encode(parse_request(request, Limits()))])
assert abs(scores - expected).max() <= 1e-6, (scores, expected)
print("scored")
"""
)


def test_scoring_needs_no_package_of_training(artifact):
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, str(artifact)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "scored\n", done.stderr


def test_golden_requests_are_json_of_callers(artifact):
    lines = (artifact / "golden.jsonl").read_text().splitlines()
    assert 0 < len(lines) <= 64
    assert set(json.loads(lines[0])) == {"request", "scores"}
