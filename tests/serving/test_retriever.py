"""Items of an artifact: those of `predict`; filters against a full ranking."""

import asyncio
import copy
import json
import subprocess
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tokenrec
from tests.serving.retrieval_worlds import (
    EVENTS,
    ITEMS,
    catalogue,
    codes_config,
    next_item_config,
    opened_run,
    prepare_baskets,
)
from tests.serving.without_training import WITHOUT_TRAINING
from tokenrec.cli.main import main
from tokenrec.config import Config, DataConfig, HeadConfig
from tokenrec.errors import InputError
from tokenrec.serving.artifact import MANIFEST_FILE, digest_manifest, read_artifact
from tokenrec.serving.compare_items import count_swaps, find_difference
from tokenrec.serving.export.run import check_config, write_artifact
from tokenrec.serving.golden import replay_golden
from tokenrec.serving.request import BadRequest, Limits
from tokenrec.serving.retrieval_request import parse_retrieval
from tokenrec.serving.retriever import Retrieved
from tokenrec.serving.scorer import open_artifact, open_retriever, open_scorer

TOLERANCE = 1e-5
HEADS = ("next_item", "semantic_id")


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Artifacts of both heads, each with its run and what `predict` answers."""
    pytest.importorskip("flatbuffers", reason="an artifact is written with it")
    folder = tmp_path_factory.mktemp("retrieval")
    data = prepare_baskets(folder / "data")
    found = {}
    for head, config in zip(
        HEADS, (next_item_config(data), codes_config(data)), strict=True
    ):
        run, predicted = opened_run(config)
        out = folder / head
        out.mkdir()
        write_artifact(run, "test", predicted, out, ("cpu",), TOLERANCE)
        retriever = open_retriever(out, check=False)
        retriever.warm(batches=(4,))
        found[head] = (out, retriever, predicted, run)
    return found


@pytest.fixture(params=HEADS)
def served(request, exported):
    """Artifact, retriever and predictions of a head."""
    return exported[request.param][:3]


def answer(retriever, *values):
    encoded = [retriever.encode(parse_retrieval(value, Limits())) for value in values]
    prefixes = retriever.prefill(encoded)
    return retriever.retrieve(list(zip(prefixes, encoded, strict=True)))


def ranking(retriever, request):
    """All items, best first."""
    (every,) = answer(retriever, request | {"k": ITEMS, "drop_seen": False})
    assert sorted(every.items) == catalogue()["item_id"]
    return every


def test_items_are_those_of_predict(served):
    _, retriever, predicted = served
    assert len(predicted) == 8
    answers = answer(retriever, *(one.request for one in predicted))
    for wanted, found in zip(predicted, answers, strict=True):
        assert not find_difference((wanted.items, wanted.scores), found, TOLERANCE)
    # Some more requests than a program holds are answered in two calls.
    assert retriever.batch_buckets == (4,)
    assert len(answers) == 8
    assert retriever.compiles == 3


def test_a_filtered_search_is_a_full_ranking_less_the_others(served):
    """Of semantic ids too: the beams hold all nodes, so that the search is exact."""
    _, retriever, predicted = served
    items = catalogue()
    rows = {item: row for row, item in enumerate(items["item_id"])}
    request = predicted[3].request
    every = ranking(retriever, request)
    seen = set(request["history"]["item_id"])
    tags, price, brand = items["tags"], items["price"], items["brand"]
    cases = [
        ({"filter": {"brand": ["a", "c"]}}, lambda row: brand[row] in "ac"),
        # A value has its own id, also where the model reads a row that several share.
        ({"filter": {"item": [100, 103, 109]}}, lambda row: row in (0, 3, 9)),
        ({"filter": {"tags": [3, 5]}}, lambda row: {3, 5} & set(tags[row])),
        (
            {"filter": {"price": {"min": 0.3, "max": 0.8}}},
            lambda row: price[row] is not None and 0.3 <= round(price[row], 9) <= 0.8,
        ),
        (
            {"filter": {"price": {"max": 0.5}, "brand": ["b"]}},
            lambda row: price[row] is not None and row <= 5 and brand[row] == "b",
        ),
        ({"exclude": [100, 103, 7]}, lambda row: row not in (0, 3)),
        ({"drop_seen": True}, lambda row: items["item_id"][row] not in seen),
        ({"filter": {"brand": ["a"]}, "exclude": items["item_id"]}, lambda row: False),
    ]
    values = [
        request | {"k": ITEMS, "drop_seen": False} | change for change, _ in cases
    ]
    for (_, keep), found in zip(cases, answer(retriever, *values), strict=True):
        kept = [place for place, item in enumerate(every.items) if keep(rows[item])]
        wanted = [every.items[place] for place in kept], every.scores[kept]
        assert not find_difference(wanted, found, TOLERANCE)
        assert len(found.items) == len(kept)
        assert len(found.scores) == len(kept)


def test_seen_items_are_those_of_the_whole_history(served):
    _, retriever, predicted = served
    request = copy.deepcopy(predicted[2].request)
    best = ranking(retriever, request).items[0]
    history = {
        name: [values[0]] * EVENTS + values
        for name, values in request["history"].items()
    }
    # An event that the model does not read any more.
    history["item_id"][0] = best
    dropped, kept = answer(
        retriever,
        request | {"history": history, "drop_seen": True, "k": ITEMS},
        request | {"history": history, "drop_seen": False, "k": ITEMS},
    )
    assert best in kept.items
    assert best not in dropped.items


def test_the_run_says_whether_seen_items_are_dropped(exported):
    for head, drops in zip(HEADS, (True, False), strict=True):
        _, retriever, predicted, _ = exported[head]
        request = predicted[1].request | {"k": ITEMS}
        (found,) = answer(retriever, request)
        assert (len(found.items) < ITEMS) == drops


def test_the_prefix_depends_on_no_choice_of_items(served):
    _, retriever, predicted = served
    plain = predicted[0].request
    chosen = plain | {"k": 2, "exclude": [101], "filter": {"brand": ["a"]}}
    one, other = (
        retriever.encode(parse_retrieval(value, Limits())) for value in (plain, chosen)
    )
    assert one.prefix_key == other.prefix_key
    assert other.k == 2
    changed = copy.deepcopy(plain)
    changed["history"]["item_id"][-1] = 100 + ITEMS
    again = retriever.encode(parse_retrieval(changed, Limits()))
    assert again.prefix_key != one.prefix_key
    assert again.unknown.history_items == one.unknown.history_items + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": ITEMS + 1}, "k: 19 is more than the 18 items"),
        ({"k": 0}, "k: 0 is no integer of at least 1"),
        ({"filter": {"brnd": ["a"]}}, "filter.brnd: no feature.*'brand'"),
        ({"filter": {"hour": [3]}}, "filter.hour: no feature"),
        ({"filter": {"brand": ["new"]}}, "filter.brand: 'new' is no value"),
        ({"filter": {"brand": {"min": 1}}}, "filter.brand: has a range"),
        ({"filter": {"price": [1]}}, "filter.price: has a list"),
        ({"filter": {"price": {"min": 2, "max": 1}}}, "min=2 is above max=1"),
        ({"filter": {"price": {"least": 2}}}, "no bound 'least'"),
        ({"filter": {"tags": []}}, "filter.tags: has no value"),
        ({"exclude": [1.5]}, r"exclude\[0\]: 1.5 is no integer"),
        ({"drop_seen": "yes"}, "drop_seen: 'yes' is not true or false"),
        ({"candidates": {}}, "no field 'candidates'"),
    ],
)
def test_wrong_choices_are_named(exported, change, message):
    _, retriever, predicted, _ = exported["next_item"]
    with pytest.raises(BadRequest, match=message):
        retriever.encode(parse_retrieval(predicted[0].request | change, Limits()))


def test_a_missing_context_is_an_error_where_the_prompt_has_a_query(exported):
    for head, is_read in zip(HEADS, (False, True), strict=True):
        _, retriever, predicted, _ = exported[head]
        request = predicted[0].request | {"context": {}}
        parsed = parse_retrieval(request, Limits())
        if is_read:
            with pytest.raises(
                BadRequest, match=r"context\.hour: the column is missing"
            ):
                retriever.encode(parsed)
        else:
            retriever.encode(parsed)


def test_vectors_give_the_scores(exported):
    folder, retriever, predicted, _ = exported["next_item"]
    model = tokenrec.load(folder)
    requests = [one.request for one in predicted]
    table = model.item_vectors()
    assert table["item_id"].to_pylist() == catalogue()["item_id"]
    vectors = np.array(table["vector"].to_pylist())
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    scores = model.user_vectors(requests) @ vectors.T
    (every,) = answer(retriever, requests[0] | {"k": ITEMS, "drop_seen": False})
    np.testing.assert_allclose(
        every.scores, scores[0, np.array(every.items) - 100], rtol=1e-5, atol=1e-5
    )
    with pytest.raises(InputError, match="retrieval run, which scores no candidates"):
        model.score(requests)
    with pytest.raises(InputError, match="has no vectors of items"):
        tokenrec.load(exported["semantic_id"][0]).item_vectors()


def test_a_file_of_requests_has_the_same_items(served, tmp_path, capsys):
    folder, _, predicted = served
    requests = [dict(one.request, k=3, filter=None) for one in predicted]
    requests[1]["filter"] = {"brand": ["a"]}
    pq.write_table(pa.Table.from_pylist(requests), tmp_path / "in.parquet")
    flags = ["--model", str(folder), "--requests", str(tmp_path / "in.parquet")]
    assert main(["score", *flags, "--out", str(tmp_path / "out.parquet")]) == 0
    assert "rows" in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    # In JSON, what is not there is left out.
    for request in requests[:1] + requests[2:]:
        del request["filter"]
    loaded = tokenrec.load(folder).retrieve(requests)
    for number, (wanted, request) in enumerate(zip(loaded, requests, strict=True)):
        mine = [row for row in rows if row["request"] == number]
        assert [row["item_id"] for row in mine] == wanted.items
        assert [row["rank"] for row in mine] == list(range(1, len(mine) + 1))
        np.testing.assert_allclose([row["score"] for row in mine], wanted.scores)
        assert {row["user_id"] for row in mine} == {request["user"]["user_id"]}
    assert [row["item_id"] for row in rows if not row["request"]] == predicted[0].items[
        :3
    ]


def test_golden_answers_are_replayed(served):
    folder, retriever, predicted = served
    golden = list(read_artifact(folder).golden())
    assert replay_golden(retriever, golden, 4, TOLERANCE) == len(predicted)
    request, (items, scores) = golden[5]
    golden[5] = request, (items[::-1], scores)
    with pytest.raises(InputError, match="golden request 5: item"):
        replay_golden(retriever, golden, 4, TOLERANCE)


def test_items_of_equal_score_may_change_places():
    found = Retrieved([1, 2, 3, 4], np.array([4.0, 3.0, 3.0, 1.0], np.float32))
    for items, scores, problem in (
        ([1, 3, 2], [4.0, 3.0, 3.0], None),
        # Cut off at the end of the answer.
        ([1, 2, 3, 9], [4.0, 3.0, 3.0, 1.0], None),
        ([2, 1, 3], [4.0, 3.0, 3.0], "item 2 of rank 1 is at rank 2"),
        ([1, 9, 2], [4.0, 3.0, 3.0], "item 9 of rank 2 is missing"),
        ([1, 2, 3], [4.0, 3.1, 3.0], "the score at rank 2"),
        ([1, 2, 3], [4.0, np.nan, 3.0], "the score at rank 2"),
        ([1, 2, 3, 4, 5], [4.0, 3.0, 3.0, 1.0, 0.0], "4 items, not 5"),
    ):
        difference = find_difference((items, scores), found, 1e-6)
        assert (difference is None) if problem is None else problem in difference
    assert count_swaps([1, 3, 2], found) == 2


def test_the_two_kinds_of_artifacts_are_told_apart(exported, artifact):
    folder = exported["next_item"][0]
    assert read_artifact(artifact).manifest["format_version"] == 1
    assert read_artifact(folder).manifest["format_version"] == 2
    with pytest.raises(InputError, match="is of a retrieval run"):
        open_scorer(folder)
    with pytest.raises(InputError, match="is of a ranking run"):
        open_retriever(artifact)


def test_a_retrieval_manifest_has_its_own_fields(exported, tmp_path):
    manifest = json.loads((exported["next_item"][0] / MANIFEST_FILE).read_text())
    del manifest["max_k"]
    manifest["digest"] = digest_manifest(manifest)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="'max_k' must be"):
        read_artifact(tmp_path)


def test_a_longest_answer_that_cannot_be_is_refused():
    retrieval = DataConfig(objective="retrieval")
    codes = HeadConfig(retrieval="semantic_id", beams=20)
    check_config(Config(data=retrieval), 1_000)
    with pytest.raises(InputError, match=r"--max-k 30 .* at most 20 beams"):
        check_config(Config(data=retrieval, head=codes), 30)
    with pytest.raises(InputError, match="--max-k 0 must be at least 1"):
        check_config(Config(data=retrieval), 0)
    with pytest.raises(InputError, match="longest answer of a retrieval run"):
        check_config(Config(), 10)


def test_a_score_that_is_no_number_is_an_error(served, monkeypatch):
    _, retriever, predicted = served
    run = retriever.programs.run

    def spoil(name, inputs, *sizes):
        found = dict(run(name, inputs, *sizes))
        if name != "prefill":
            found["scores"] = np.array(found["scores"])
            found["scores"][0, -1] = np.nan
            found["items"] = np.where(np.isnan(found["scores"]), -1, found["items"])
        return found

    monkeypatch.setattr(retriever.programs, "run", spoil)
    with pytest.raises(ArithmeticError, match="a score is not finite; look for"):
        answer(retriever, predicted[0].request)


def test_an_accelerator_keeps_prefixes_on_the_device(served, monkeypatch):
    _, retriever, predicted = served
    requests = [one.request for one in predicted[:3]]
    expected = answer(retriever, *requests)
    monkeypatch.setattr(retriever.programs, "on_host", False)
    encoded = [retriever.encode(parse_retrieval(one, Limits())) for one in requests]
    prefixes = retriever.prefill(encoded)
    assert all(isinstance(array, jax.Array) for array in prefixes[0].arrays.values())
    found = retriever.retrieve(list(zip(prefixes, encoded, strict=True)))
    for one, other in zip(found, expected, strict=True):
        assert one.items == other.items


_ALONE = (
    WITHOUT_TRAINING
    + """
from pathlib import Path
from tokenrec.serving.golden import replay_golden
from tokenrec.serving.scorer import open_artifact
retriever = open_artifact(Path(sys.argv[1]))
print(replay_golden(retriever, retriever.artifact.golden(), 4, 1e-5))
"""
)


def test_retrieval_needs_no_package_of_training(exported):
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, str(exported["semantic_id"][0])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "8\n", done.stderr


def test_an_artifact_opens_by_its_objective(exported):
    assert open_artifact(exported["semantic_id"][0]).objective == "retrieval"


def test_the_server_answers_as_predict_and_compiles_nothing_then(served):
    pytest.importorskip("orjson", reason="needs the extra serving")
    from tests.serving.server.asgi import call
    from tokenrec.serving.server.app import App
    from tokenrec.serving.server.batch_plan import BatchLimits
    from tokenrec.serving.server.batcher import Batcher
    from tokenrec.serving.server.limits import AppLimits
    from tokenrec.serving.server.load_model import ModelLoader
    from tokenrec.serving.server.metrics import ServerMetrics
    from tokenrec.serving.server.model_slot import ModelSlot
    from tokenrec.serving.server.prefix_store import PrefixStore

    folder, retriever, predicted = served
    batch, metrics, store = BatchLimits(batch=1), ServerMetrics(), PrefixStore(1 << 20)
    slot = ModelSlot(folder, ModelLoader(batch, Limits()), store, metrics)
    batcher = Batcher(store, metrics, batch)
    app = App(slot, batcher, metrics, AppLimits())
    batcher.start()
    for wanted in predicted:
        for extra in ({}, {"exclude": wanted.items[:1], "k": 3}):
            body = wanted.request | extra
            found = asyncio.run(call(app, "/v1/retrieve", body)).json
            (expected,) = answer(retriever, body)
            assert found["items"] == expected.items
            np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-5)
        assert found["cache"] == "hit"
    (listed,) = asyncio.run(call(app, "/v1/models")).json["models"]
    assert (listed["head"], listed["max_k"]) == (retriever.head, retriever.max_k)
    assert slot.model.compiles_since_ready() == 0
    batcher.close()
    app.close()
