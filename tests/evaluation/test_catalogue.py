"""Retrieval on prepared files: goals, ranks, losses, metrics, and learning."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.walks import (
    ITEMS,
    STEPS,
    USERS,
    code_config,
    first_batch,
    opened,
    prepare_walks,
    save_codes,
    walk,
    walking,
)
from tests.worlds import mesh_of, one_device
from tokenrec.cli.main import main
from tokenrec.data.dataset import open_dataset
from tokenrec.data.pipeline import batch_shapes, eval_batches
from tokenrec.errors import InputError
from tokenrec.evaluation.baseline_reports import retrieval_baselines
from tokenrec.evaluation.baselines import goal_counts
from tokenrec.evaluation.catalogue import RankedItems, rank_by_counts, summarize
from tokenrec.evaluation.evaluate import evaluate_run, make_retrieval_step
from tokenrec.evaluation.predict import predict_run
from tokenrec.metrics.ranking import ranks_of
from tokenrec.models.heads import NextItemHead
from tokenrec.ops.tables.storage import CYCLE
from tokenrec.sharding import to_devices
from tokenrec.state import init_state
from tokenrec.step import step_loss, train_step
from tokenrec.train_loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_walks(tmp_path_factory.mktemp("data") / "walks")


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return save_codes(tmp_path_factory.mktemp("codes") / "semantic_ids.parquet")


def test_the_goal_of_an_event_is_the_item_of_the_next_one(data):
    config = walking(data)
    dataset, _ = opened(config)
    batch = first_batch(dataset, config).batch
    asked = batch.goals[:, :-1, 0] >= 0
    assert np.array_equal(batch.goals[:, :-1, 0][asked], batch.items[:, 1:][asked])
    last, before = (
        dataset.catalogue.item_id[batch.goals[:, -1, 0]],
        dataset.catalogue.item_id[batch.items[:, -1]],
    )
    assert set(((last - before) % ITEMS).tolist()) <= {1, 2}
    assert np.array_equal(batch.weight > 0, batch.goals[..., 0] >= 0)
    assert asked.any()


def test_every_paradigm_asks_evaluation_for_the_same_items_after_the_same_history(data):
    found = []
    for options in ({}, {"paradigm": "nio", "overlap": 0}):
        config = walking(data, data_options=options)
        dataset, _ = opened(config)
        asked = {}
        for host, who in eval_batches(dataset, config.data, "test"):
            real = host.rows[:, 0, 0] >= 0
            for user, history, goal in zip(
                who.user_id,
                host.batch.items[real],
                host.batch.goals[real, 0, 0],
                strict=True,
            ):
                asked[int(user)] = (history.tolist(), int(goal))
        found.append(asked)
    assert found[0] == found[1]
    assert len(found[0]) == USERS


def test_batches_have_the_shapes_that_are_compiled_ahead(data, codes):
    for options in (
        {},
        {"paradigm": "nio", "overlap": 0, "candidates": 3},
        {"semantic_ids": str(codes)},
    ):
        config = walking(data, data_options=options)
        dataset, _ = opened(config)
        batch = first_batch(dataset, config).batch
        expected = batch_shapes(dataset.schema, config.data, batch_size=16)[8]
        assert jax.tree.map(
            lambda x: (x.shape, np.dtype(x.dtype)), batch
        ) == jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), expected)


def test_a_query_shows_the_context_and_nothing_of_the_item(data):
    config = walking(data, data_options={"paradigm": "nio", "overlap": 0})
    dataset, _ = opened(config)
    batch = first_batch(dataset, config).batch
    item, hour = batch.target.ids[..., 0], batch.target.ids[..., 1]
    assert (item == 0).all()
    assert (hour > 0).all()


@pytest.mark.parametrize("cosine", [False, True])
def test_a_sampled_softmax_that_draws_every_item_once_is_the_full_one(cosine):
    from flax import nnx

    from tokenrec.config import HeadConfig

    @jax.jit
    def both():
        head = NextItemHead(
            HeadConfig(cosine=cosine, temperature=0.7), 8, 20, rngs=nnx.Rngs(0)
        )
        h = jax.random.normal(jax.random.key(1), (3, 4, 8))
        goals = jax.random.randint(jax.random.key(2), (3, 4, 2), -1, 20)
        every = jnp.arange(20)

        def sampled(h):
            return head.sampled_losses(
                h, goals, head.lookup(goals), every, head.vectors()
            ).sum()

        full = jax.value_and_grad(lambda h: head.full_losses(h, goals).sum())(h)
        return full, jax.value_and_grad(sampled)(h)

    with jax.set_mesh(one_device()):
        full, drawn = both()
        # Another order of float32 sums: measured 3.6e-7 in losses and gradients, 2 % of
        # the bound, with AVX2 and with AVX512.
        for a, b in zip(drawn, full, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_sampled_softmax_estimates_the_partition_of_the_full_one():
    """The mean of exp(loss) over draws is, in expectation, that of the full softmax."""
    from flax import nnx

    from tokenrec.config import HeadConfig

    @jax.jit
    def measured():
        head = NextItemHead(HeadConfig(), 8, 50, rngs=nnx.Rngs(0))
        h = jax.random.normal(jax.random.key(1), (1, 1, 8))
        goals = jnp.array([[[7]]])

        def loss(key):
            drawn = jax.random.randint(key, (10,), 0, 50)
            return head.sampled_losses(
                h, goals, head.lookup(goals), drawn, head.vectors()[drawn]
            ).sum()

        losses = jax.vmap(loss)(jax.random.split(jax.random.key(3), 4000))
        full = head.full_losses(h, goals).sum()
        return jnp.mean(jnp.exp(losses)), jnp.exp(full)

    with jax.set_mesh(one_device()):
        estimate, full = map(float, measured())
    # Measured 0.0007. The standard error of 4,000 draws of 10 items is 0.0045, and the
    # key fixes the draws, so that another processor changes rounding alone.
    assert abs(estimate / full - 1) < 0.02


@pytest.mark.parametrize(
    "head", [{"copy": True}, {"negatives": 16}, {"cosine": True, "temperature": 0.1}]
)
def test_ranks_are_those_of_all_scores(data, head):
    config = walking(data, head=head | {"top_k": ITEMS})
    dataset, model = opened(config)
    mesh = one_device()
    with jax.set_mesh(mesh):
        state = init_state(model, 0)
        find = make_retrieval_step(model, dataset)
        host, _ = next(eval_batches(dataset, config.data, "valid"))
        found = jax.device_get(find(state, to_devices(host.batch, mesh)))
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert (np.sort(found.items, axis=1) == np.arange(ITEMS)).all()
    scores = np.empty_like(found.scores)
    np.put_along_axis(scores, found.items, found.scores, axis=1)
    assert np.array_equal(found.ranks, ranks_of(scores, host.batch.goals[:, 0]))


def test_training_and_evaluation_raise_the_same_items_of_the_history(data):
    config = walking(
        data,
        head={"copy": True, "top_k": ITEMS},
        data_options={"paradigm": "nio", "overlap": 0},
    )
    dataset, model = opened(config)
    mesh = one_device()
    with jax.set_mesh(mesh):
        state = init_state(model, 0)
        host, _ = next(eval_batches(dataset, config.data, "valid"))
        batch = to_devices(host.batch, mesh)
        loss = jax.jit(step_loss, static_argnums=0)(model, state, batch)
        found = jax.device_get(make_retrieval_step(model, dataset)(state, batch))
    scores = np.empty_like(found.scores)
    np.put_along_axis(scores, found.items, found.scores, axis=1)
    goals = host.batch.goals[:, 0, :1]
    known = goals[:, 0] >= 0
    logs = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    chosen = np.take_along_axis(logs, np.maximum(goals, 0), axis=1)[known]
    # Another order of float32 sums: measured 4.8e-7 of 4.6, 1 % of the bound.
    np.testing.assert_allclose(loss, -chosen.mean(), rtol=1e-5)


def test_seen_items_are_left_out_if_asked(data):
    config = walking(data, head={"drop_seen": True, "top_k": ITEMS})
    dataset, model = opened(config)
    mesh = one_device()
    with jax.set_mesh(mesh):
        host, _ = next(eval_batches(dataset, config.data, "valid"))
        found = jax.device_get(
            make_retrieval_step(model, dataset)(
                init_state(model, 0), to_devices(host.batch, mesh)
            )
        )
    for items, scores, history in zip(
        found.items, found.scores, host.batch.items, strict=True
    ):
        seen = set(history[history >= 0].tolist())
        assert set(items[scores > -np.inf].tolist()) == set(range(ITEMS)) - seen
        assert (items[scores == -np.inf] == -1).all()


def test_baselines_are_the_popular_items_and_the_users_own(data):
    config = walking(data, head={"top_k": ITEMS})
    dataset = open_dataset(data)
    mesh = one_device()
    learned = goal_counts(dataset.load("train"), ITEMS, None)
    assert learned.sum() == USERS * (STEPS - 2)
    with jax.set_mesh(mesh):
        host, _ = next(eval_batches(dataset, config.data, "valid"))
        popular, own = (
            jax.device_get(
                rank_by_counts(
                    config.head,
                    repeat,
                    jnp.asarray(learned),
                    to_devices(host.batch, mesh),
                )
            )
            for repeat in (False, True)
        )
        reports = retrieval_baselines(config, dataset, "valid", mesh)
    order = learned[popular.items]
    assert (np.diff(order, axis=1) <= 0).all()
    for items, history in zip(own.items, host.batch.items, strict=True):
        seen = np.bincount(history[history >= 0], minlength=ITEMS)
        assert (np.diff(seen[items]) <= 0).all()
        assert (np.diff(learned[items])[np.diff(seen[items]) == 0] <= 0).all()
    goals = host.batch.goals[:, 0]
    scores = np.broadcast_to(learned, (len(goals), ITEMS))
    assert np.array_equal(popular.ranks, ranks_of(scores, goals))
    # Eight steps of one or two around twelve items: many users have not met the item
    # that comes next.
    assert (
        reports["popularity"]["retrieval"]["users"]
        == reports["repeat"]["retrieval"]["users"]
        == USERS
    )
    assert (
        reports["repeat"]["retrieval"]["mrr"]
        != reports["popularity"]["retrieval"]["mrr"]
    )


def test_goals_of_one_request_in_several_streams_count_once():
    def answers(user, time, ranks, goals):
        nothing = np.zeros((len(user), 1))
        ranks = np.array(ranks, float)
        return RankedItems(
            np.array(user),
            np.array(time),
            nothing,
            nothing > 0,
            nothing,
            ranks,
            np.array(goals),
        )

    parts = [
        # Item 4 stands in the request twice, as in two lines of a basket.
        answers([5, 5], [1, 1], [[1, 20], [12, 1]], [[4, 7], [8, 4]]),
        answers([5, 9], [2, 1], [[3, 0], [np.inf, 0]], [[4, -1], [6, -1]]),
    ]
    found = summarize(iter(parts), 100)["retrieval"]
    assert (found["users"], found["requests"], found["catalogue"]) == (2, 3, 100)
    # Means of float64 quotients: equal here, of a relative 1e-6 allowed.
    assert found["recall@10"] == pytest.approx((1 / 3 + 1 + 0) / 3)
    assert found["mrr"] == pytest.approx((1 + 1 / 3 + 0) / 3)


def test_metrics_that_look_further_than_the_answers_are_not_given():
    one = np.array([[3.0]])
    answer = RankedItems(
        np.array([5]), np.array([1]), one, one > 0, one, one, np.array([[4]])
    )
    found = summarize(iter([answer]), 100, listed=20)["retrieval"]
    assert (found["recall@10"], found["recall@50"], found["ndcg@50"]) == (
        1.0,
        None,
        None,
    )


@pytest.mark.parametrize(
    "kind", ["spread", pytest.param("codes", marks=pytest.mark.slow)]
)
def test_a_step_and_its_answers_agree_on_a_mesh(data, codes, kind):
    if kind == "codes":
        config = code_config(data, codes)
        config.head.copy = True
    else:
        config = walking(data, head={"negatives": 16, "copy": True})
        config.tokens.replicate_rows = 5
    config.model.layers = 1
    dataset, model = opened(config)
    host, batch = (
        next(eval_batches(dataset, config.data, "valid"))[0].batch,
        first_batch(dataset, config).batch,
    )
    results = []
    for mesh in (one_device(), mesh_of(2, 2, 2)):
        with jax.set_mesh(mesh):
            state, train_batch, eval_batch = (
                init_state(model, 0),
                to_devices(batch, mesh),
                to_devices(host, mesh),
            )
            step = (
                jax.jit(train_step, static_argnums=0)
                .lower(model, state, train_batch)
                .compile()
            )
            state, metrics = step(state, train_batch)
            find = make_retrieval_step(model, dataset)
            results.append(
                jax.device_get(
                    (metrics.loss, metrics.grad_norm, find(state, eval_batch).scores)
                )
            )
            # No device ever holds all item vectors, or their gradient.
            if kind == "spread" and mesh.size == 8:
                programs = (
                    step.as_text(),
                    find.lower(state, eval_batch).compile().as_text(),
                )
                assert all(
                    f"[{CYCLE // 8}," in text and f"[{CYCLE}," not in text
                    for text in programs
                )
    # AdamW's first step magnifies rounding: measured 7.6e-6 in a gradient norm of 25
    # and 3.3e-6 in scores, under 1 % of the bound, with AVX2 and with AVX512.
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Train a run with the full softmax."""
    workdir = tmp_path_factory.mktemp("run")
    train(walking(data), workdir, progress=False)
    return workdir


def test_the_next_item_of_a_walk_is_learned(trained):
    found = evaluate_run(trained, "test", "best", None)["retrieval"]
    assert (found["users"], found["catalogue"]) == (USERS, ITEMS)
    # Measured 1.0 of 96 users; chance is 1 in 12. Another rounding moves single users.
    assert found["recall@1"] > 0.8


# The full softmax learns above; losses of codes: tests/evaluation/test_generate.py.
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sampled", "codes"])
def test_a_walk_around_the_circle_is_learned(data, codes, kind, tmp_path):
    config = {
        "sampled": lambda: walking(data, head={"negatives": 16}, steps=150),
        "codes": lambda: code_config(data, codes),
    }[kind]()
    if kind == "sampled":
        config.optim.table_learning_rate = 0.3
    train(config, tmp_path, progress=False)
    found = evaluate_run(tmp_path, "test", "best", None)["retrieval"]
    assert found["users"] == USERS
    assert found["catalogue"] == ITEMS
    # Measured 1.0 in both kinds; chance is 1 in 12.
    assert found["recall@1"] > 0.8
    assert found["recall@10"] >= found["recall@1"]


def test_predict_writes_the_best_items_by_their_own_ids(trained, tmp_path):
    out = tmp_path / "top.parquet"
    assert predict_run(trained, "test", "best", None, out) == USERS * 5
    table = pq.read_table(out)
    assert table.column_names[:4] == ["user_id", "rank", "item_id", "score"]
    rows = table.to_pylist()
    assert [row["rank"] for row in rows[:5]] == [1, 2, 3, 4, 5]
    assert {row["user_id"] for row in rows} == set(range(USERS))
    assert all(100 <= row["item_id"] < 100 + ITEMS for row in rows)
    right = 100 + walk(np.arange(USERS), np.full(USERS, STEPS - 1))
    hits = [row["rank"] for row in rows if row["item_id"] == right[row["user_id"]]]
    found = evaluate_run(trained, "test", "best", None)["retrieval"]
    # The same quotient of two integers.
    assert hits.count(1) / USERS == pytest.approx(found["recall@1"])


def test_the_command_line_writes_the_metrics(trained, tmp_path, capsys):
    arguments = [
        "evaluate",
        f"--workdir={trained}",
        "--split=valid",
        f"--json={tmp_path / 'eval.json'}",
    ]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "eval.json").read_text())["retrieval"]
    assert {"recall@10", "ndcg@10", "users", "catalogue"} <= report.keys()
    assert "recall@10" in capsys.readouterr().out
    assert main([*arguments, "--baselines"]) == 0
    assert {"popularity", "repeat"} == json.loads((tmp_path / "eval.json").read_text())[
        "baselines"
    ].keys()
    assert "popularity" in capsys.readouterr().out


def test_a_data_set_without_tasks_cannot_be_ranked(data, tmp_path):
    config = walking(data)
    config.data.objective = "ranking"
    config.tokens.fused = False
    with pytest.raises(InputError, match="no task"):
        train(config, tmp_path, progress=False)
