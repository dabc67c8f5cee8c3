"""Generated semantic ids: scores, visibility, and the ids that a run accepts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.walks import (
    ITEMS,
    code_config,
    first_batch,
    opened,
    prepare_walks,
    read_outs,
    save_codes,
    walking,
)
from tests.worlds import one_device
from tokenrec.checkpoint.run_folder import check_schema, create_or_check_run
from tokenrec.config import DecoderConfig, ModelConfig
from tokenrec.data.dataset import open_dataset
from tokenrec.data.pipeline import eval_batches
from tokenrec.data.semantic_id_feature import SEMANTIC_ID
from tokenrec.data.semantic_id_file import (
    SemanticIds,
    load_semantic_ids,
    save_semantic_ids,
)
from tokenrec.errors import InputError
from tokenrec.evaluation.generate import generate, jit_generate_step
from tokenrec.evaluation.trie import build_trie
from tokenrec.sharding import to_devices
from tokenrec.state import init_state
from tokenrec.step import loss_fn
from tokenrec.tokens.embed import inverses


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_walks(tmp_path_factory.mktemp("data") / "walks")


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return save_codes(tmp_path_factory.mktemp("codes") / "semantic_ids.parquet")


NIO = {"paradigm": "nio", "overlap": 0}
# Grouped queries, a local layer that is shorter than a history, and scaled words.
LANGUAGE_MODEL = ModelConfig(
    kind="gemma3",
    width=16,
    heads=2,
    layers=2,
    ffn_width=24,
    windows=(),
    decoder=DecoderConfig(
        vocabulary=8, kv_heads=1, head_width=6, windows=(5, 0), local_rope_base=50.0
    ),
)


@pytest.mark.parametrize(
    ("options", "copy", "backbone"),
    [
        pytest.param({}, False, None, marks=pytest.mark.slow),
        pytest.param(NIO, False, None, marks=pytest.mark.slow),
        ({}, True, None),
        (NIO, False, LANGUAGE_MODEL),
    ],
)
def test_the_score_of_a_generated_item_is_its_probability_in_training(
    data, codes, options, copy, backbone, monkeypatch
):
    """Compare teacher forcing over the stream with the cached prefix and beams."""
    # Eight events are three slices, of which the last is padded.
    monkeypatch.setattr("tokenrec.evaluation.generate.HISTORY_SLICE", 3)
    config = code_config(data, codes, **options)
    config.head.copy = copy
    if backbone is not None:
        # The items of the history are written in the words that are generated.
        config.model, config.tokens.text = backbone, {"history": (SEMANTIC_ID,)}
    dataset, model = opened(config)
    mesh = one_device()
    with jax.set_mesh(mesh):
        state = init_state(model, 0)
        host, _ = next(eval_batches(dataset, config.data, "valid"))
        batch = to_devices(host.batch, mesh)
        trie = build_trie(dataset.catalogue.codes)
        beams = jax.device_get(
            jax.jit(generate, static_argnums=0)(
                model, state, batch, trie, jnp.asarray(dataset.catalogue.codes)
            )
        )
        # All items exist, each once.
        assert (np.sort(beams.items, axis=1) == np.arange(ITEMS)).all()

        @functools.partial(jax.jit, static_argnums=0)
        def loss(model, state, lone):
            found = model.embedder.find(lone)
            rows = model.embedder.gather(state.tables, found)
            return loss_fn(
                state.params, rows, model, inverses(found), lone, jnp.ones(1), None
            )

        def loss_of(item):
            one = np.full_like(host.batch.goals, item)
            asked = host.batch._replace(goals=one, codes=dataset.catalogue.codes[one])
            per_stream = []
            for number in (0, 5):
                lone = jax.tree.map(lambda x, n=number: x[n : n + 1], asked)
                lone = to_devices(lone, mesh)
                per_stream.append(float(loss(model, state, lone)))
            return per_stream

        for item in (0, 7):
            scores = [beams.scores[n][beams.items[n] == item].item() for n in (0, 5)]
            # float32 sums in another order: measured 1.4e-6 of a score of about 4, with
            # AVX2 and with AVX512; seven times as much for other processors.
            np.testing.assert_allclose(
                scores, [-x for x in loss_of(item)], rtol=0, atol=1e-5
            )


def test_unseen_items_fill_the_answer_however_narrow_the_beams(data, codes):
    """The search leaves seen items out; removed afterwards they would leave holes."""
    config = code_config(data, codes)
    config.head.drop_seen = True
    config.head.beams = config.head.top_k = 4
    dataset, model = opened(config)
    mesh = one_device()
    with jax.set_mesh(mesh):
        host, _ = next(eval_batches(dataset, config.data, "valid"))
        step = jit_generate_step(model, dataset.catalogue.codes)
        found = jax.device_get(step(init_state(model, 0), to_devices(host.batch, mesh)))
    # A walk visits the items beside its end.
    assert (host.batch.items >= 0).all(axis=1).any()
    for seen, items in zip(host.batch.items, found.items, strict=True):
        unseen = np.setdiff1d(np.arange(ITEMS), seen)
        kept = items[items >= 0]
        assert np.isin(kept, unseen).all()
        assert len(set(kept.tolist())) == len(kept) == min(4, len(unseen))


def test_codes_of_one_goal_move_no_other_read_out(data, codes):
    config = code_config(data, codes)
    dataset, model = opened(config)
    mesh = one_device()
    batch = first_batch(dataset, config).batch
    other = batch.codes.copy()
    other[:, 4] = (other[:, 4] + 1) % 2
    with jax.set_mesh(mesh):
        state = init_state(model, 0)
        read = jax.jit(read_outs, static_argnums=0)
        a, b = (
            np.asarray(read(model, state, to_devices(batch._replace(codes=c), mesh)))
            for c in (batch.codes, other)
        )
    layout = model.layout(8)
    moved = np.abs(a - b).max(axis=(0, 2)) > 0
    assert moved.any()
    assert (layout.candidate[layout.readout][moved] == 4).all()


@pytest.mark.parametrize("kind", ["next item", "codes", "codes of a language model"])
def test_what_an_event_reads_is_what_serving_reads_after_it(data, codes, kind):
    """Compare the read-outs of a training stream with those of each history alone.

    Nothing after an event changes its read-out, or those of the codes of its goal.
    """
    config = walking(data) if kind == "next item" else code_config(data, codes)
    if kind == "codes of a language model":
        config.model = LANGUAGE_MODEL
    dataset, model = opened(config)
    mesh = one_device()
    batch = first_batch(dataset, config).batch
    read = jax.jit(read_outs, static_argnums=0)
    with jax.set_mesh(mesh):
        state = init_state(model, 0)
        packed = np.asarray(read(model, state, to_devices(batch, mesh)))
        # The newest events are cut away.
        for cut in (1, 3):
            event = 7 - cut
            moved = {name: getattr(batch, name) for name in ("valid", "items")}
            shifted = jax.tree.map(
                lambda x, by=cut: np.roll(x, by, axis=1),
                (batch.state, batch.action, moved),
            )
            shifted[2]["valid"][:, :cut] = False
            shifted[2]["items"][:, :cut] = -1
            asked = {
                "goals": batch.goals[:, event : event + 1],
                "weight": batch.weight[:, event : event + 1],
            }
            rows = [event]
            if kind != "next item":
                asked["codes"] = batch.codes[:, event : event + 1]
                # Behind the 8 events, two codes for each.
                rows += [8 + 2 * event, 8 + 2 * event + 1]
            lone = batch._replace(
                state=shifted[0], action=shifted[1], **asked, **shifted[2]
            )
            served = np.asarray(read(model, state, to_devices(lone, mesh)))
            # Elsewhere the codes are padding.
            real = asked["goals"][:, 0, 0] >= 0
            assert real.any()
            # float32 sums in another order: measured 2.8e-6, with AVX2 and with AVX512;
            # ten times as much for other processors.
            np.testing.assert_allclose(
                served[real], packed[real][:, rows], rtol=0, atol=3e-5
            )


@pytest.mark.parametrize("kind", ["full", "sampled", "codes"])
def test_no_read_out_sees_what_comes_after_its_event(data, codes, kind):
    """The next event is the goal: the codes beside an event must not see it either."""
    config = (
        code_config(data, codes)
        if kind == "codes"
        else walking(data, head={"negatives": 16 * (kind == "sampled")})
    )
    dataset, model = opened(config)
    mesh, later = one_device(), np.arange(8) >= 5
    batch = first_batch(dataset, config).batch
    assert batch.valid[:, 4:6].all(axis=1).any()

    def changed(signals):
        return signals._replace(
            ids=np.where(later[:, None], np.roll(signals.ids, 1, axis=0), signals.ids)
        )

    other = batch._replace(
        state=changed(batch.state),
        action=changed(batch.action),
        items=np.where(later, np.roll(batch.items, 1, axis=0), batch.items),
    )
    with jax.set_mesh(mesh):
        state = init_state(model, 0)
        read = jax.jit(read_outs, static_argnums=0)
        a, b = (
            np.asarray(read(model, state, to_devices(x, mesh))) for x in (batch, other)
        )
    layout = model.layout(8)
    moved = np.abs(a - b).max(axis=(0, 2)) > 0
    assert np.array_equal(moved, layout.event[layout.readout] >= 5)


def test_semantic_ids_that_lack_an_item_are_refused(data, codes, tmp_path):
    # Without the digest of all ids.
    table = pq.read_table(codes).replace_schema_metadata(None)
    pq.write_table(table.slice(1), tmp_path / "semantic_ids.parquet")
    with pytest.raises(InputError, match="item_id=100"):
        open_dataset(data, (), str(tmp_path))


def test_other_semantic_ids_of_the_same_sizes_are_refused(data, codes, tmp_path):
    """The codes of a run are its vocabulary: swapped items would be confused."""
    swapped = load_semantic_ids(codes)
    save_semantic_ids(
        SemanticIds(swapped.item_id, np.roll(swapped.codes, 1, axis=0)),
        tmp_path / "ids.parquet",
    )
    mine, others = (
        open_dataset(data, ("semantic_id",), str(path))
        for path in (codes, tmp_path / "ids.parquet")
    )
    assert mine.schema.levels == others.schema.levels
    create_or_check_run(code_config(data, codes), mine, tmp_path / "run")
    check_schema(mine.schema, tmp_path / "run")
    with pytest.raises(InputError, match="semantic ids"):
        check_schema(others.schema, tmp_path / "run")


def test_semantic_ids_may_be_goals_without_being_features(data, codes):
    config = code_config(data, codes, exclude=("semantic_id",))
    dataset, _ = opened(config)
    assert [f.name for f in dataset.schema.features] == ["item", "hour"]
    assert dataset.schema.levels == (3, 2, 2)
    assert first_batch(dataset, config).batch.codes.shape == (16, 8, 1, 3)
    with_feature = open_dataset(data, (), str(codes))
    feature = with_feature.schema.feature("semantic_id")
    assert with_feature.catalogue.ids.shape[1] == 1 + feature.length
    assert (
        with_feature.catalogue.ids[:, 1:].max()
        < with_feature.schema.tables["semantic_id"]
    )
    assert dataclasses.replace(with_feature.schema, features=()) != dataset.schema
