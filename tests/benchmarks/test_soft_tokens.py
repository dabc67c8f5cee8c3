"""The arms of soft tokens against text: what their prompts hold, what they may spend, and that they run and resume."""

import json
from concurrent.futures import ProcessPoolExecutor

import jax
import numpy as np
import pytest

from benchmarks import attention_maps, signal_probe, soft_tokens
from benchmarks.soft_tokens_arms import (
    ARMS,
    BATCH,
    TASKS,
    Task,
    plan_arms,
    request_flops,
    task_arms,
)
from tests.worlds import SCHEMA, one_device, place, random_batch, tiny
from tests.worlds import TASKS as LABELS
from tokenrec.config.validate import validate
from tokenrec.data.dataset import open_dataset
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.errors import InputError
from tokenrec.semantic_ids.build import build_semantic_ids
from tokenrec.state import build_model, init_state
from tokenrec.step import eval_step
from tokenrec.tokens.layout import ROLES

EVENTS, LEVELS = 6, 3
RANKING = Task(
    "synthetic",
    "item",
    {
        "history": ("semantic_id", "hour", "price", "seconds"),
        "candidate": ("semantic_id", "place", "price"),
    },
    "",
    4,
)
RETRIEVAL = Task(
    "synthetic", "item", {"history": ("item", "hour", "seconds")}, "click", 3
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "synthetic"
    prepare(SyntheticSource(8_000, users=40, items=40, requests=4), out)
    return out


@pytest.fixture(scope="module")
def ids(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("ids") / "ids"
    build_semantic_ids(data, out, levels=LEVELS - 1, codes=4)
    return out


@pytest.fixture(autouse=True)
def tasks(monkeypatch):
    monkeypatch.setitem(TASKS, "ranking", RANKING)
    monkeypatch.setitem(TASKS, "retrieval", RETRIEVAL)
    monkeypatch.setitem(soft_tokens.TITLES, "ranking", "Synthetic")
    monkeypatch.setitem(soft_tokens.EVENTS, "ranking", EVENTS)


def planned(task, data, ids, arms=None, requests=16 * BATCH):
    return plan_arms(
        task,
        arms or task_arms(task),
        data,
        ids,
        requests=requests,
        events=EVENTS,
        seed=0,
    )


def model_of(config):
    schema = open_dataset(
        config.data.path, config.data.exclude, config.data.semantic_ids
    ).schema
    return build_model(config, schema, tuple(task.name for task in schema.tasks))


def counts(config):
    """Tokens of a request with one candidate, by role."""
    layout = model_of(config).layout(EVENTS, candidates=1)
    names = [ROLES[role] for role in layout.roles]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def test_the_tokens_of_every_ranking_arm_are_counted_exactly(data, ids):
    soft = {"user": 1, "event": EVENTS, "query": 1, "target": 1}
    # Segment, three interests and an age; hour and load; codes, place and price.
    text = {"user": 5, "event": EVENTS * (LEVELS + 3), "query": 2, "target": LEVELS + 2}
    expected = {
        **dict.fromkeys(
            ("soft", "soft_flops", "soft_same_features", "random", "NO_FEAT"), soft
        ),
        **dict.fromkeys(("text", "text_flops"), text),
        "text_budget": text | {"event": EVENTS},
        "soft_compressed": soft | {"event": EVENTS // 2 + 1},
        "WH_SID": soft | {"event": EVENTS * LEVELS},
        "NO_FEAT_STRICT": {"event": EVENTS, "target": 1},
        "WH_SID_NO_FEAT": {"event": EVENTS * LEVELS, "target": 1},
    }
    assert {
        arm: counts(config) for arm, config in planned("ranking", data, ids).items()
    } == expected


def test_the_tokens_of_every_retrieval_arm_are_counted_exactly(data):
    configs = planned("retrieval", data, None)
    rows = {arm: soft_tokens.prompt_tokens(config) for arm, config in configs.items()}
    soft, text = 1 + EVENTS + 1, 5 + 3 * EVENTS + 2
    assert rows == {
        **dict.fromkeys(("soft", "soft_flops", "soft_same_features", "random"), soft),
        **dict.fromkeys(("text", "text_flops"), text),
        "text_budget": 5 + EVENTS + 2,
    }
    assert {config.data.semantic_ids for config in configs.values()} == {""}


def test_an_arm_reads_the_features_of_its_tokens_and_no_others(data, ids):
    configs = planned("ranking", data, ids)
    read = {
        arm: {f.name for f in model_of(config).schema.features}
        for arm, config in configs.items()
    }
    assert read["text"] == {
        *("segment", "interests", "age", "hour", "load"),
        *("semantic_id", "price", "seconds", "place"),
    }
    assert read["NO_FEAT_STRICT"] == read["WH_SID_NO_FEAT"] == {"semantic_id", "item"}
    assert (
        read["soft"]
        >= read["NO_FEAT"]
        > {"semantic_id", "item", "genre", "place", "hour", "segment"}
    )
    assert "clicked" in read["soft"] - read["NO_FEAT"]


def test_no_arm_spends_more_than_its_budget_and_none_leaves_a_step_of_it(data, ids):
    configs = planned(
        "ranking", data, ids, ["soft", "text", "text_flops", "soft_flops"]
    )
    cost = {arm: request_flops(config) for arm, config in configs.items()}
    spent = {arm: cost[arm] * config.optim.steps for arm, config in configs.items()}
    assert configs["soft"].optim.steps == configs["text"].optim.steps == 16
    assert spent["soft"] - cost["text"] < spent["text_flops"] <= spent["soft"]
    assert spent["text"] - cost["soft"] < spent["soft_flops"] <= spent["text"]
    assert configs["text_flops"].optim.steps < 16 < configs["soft_flops"].optim.steps
    for config in configs.values():
        assert config.optim.warmup_steps == config.optim.steps // 10


def test_arms_of_one_task_share_order_and_training_settings(data, ids):
    configs = planned("ranking", data, ids).values()
    shared = {
        (
            c.seed,
            c.data.batch_size,
            c.data.events,
            c.data.candidates,
            c.optim.learning_rate,
            str(c.model),
        )
        for c in configs
    }
    assert len(shared) == 1


@pytest.mark.parametrize(
    ("task", "arms", "ids_given", "requests", "words"),
    [
        ("retrieval", ["WH_SID"], False, 640, "choose of soft, text"),
        ("ranking", ["soft"], False, 640, "semantic_ids"),
        ("ranking", ["soft"], True, BATCH - 1, "less than a batch"),
        ("ranking", ["text_flops"], True, BATCH, "no step"),
    ],
)
def test_wrong_arms_are_named_with_their_remedy(
    data, ids, task, arms, ids_given, requests, words
):
    with pytest.raises(InputError, match=words):
        planned(task, data, ids if ids_given else None, arms, requests)


def test_soft_tokens_are_made_of_the_named_features_alone():
    named = {"history": ("code", "watched"), "candidate": ("code",), "user": ("age",)}
    config = validate(tiny(fused=True, tokens={"soft": named}))
    model = build_model(config, SCHEMA, LABELS)
    mesh = one_device()
    with jax.set_mesh(mesh):
        state = init_state(model, 0)
        kernels = {
            name: x.shape
            for name, x in state.params.items()
            if name.endswith("inner/kernel")
        }
        batch = random_batch(config, lengths=[12] * 8)
        step = jax.jit(eval_step, static_argnums=0)

        def score(batch):
            return np.asarray(step(model, state, place(batch, mesh)))

        scores = score(batch)
        other = random_batch(config, lengths=[12] * 8, seed=1)
        # All but the two levels of `code`, which stand before `tab` and behind `video` and `tags`.
        changed = batch.state.ids.copy()
        changed[..., :4], changed[..., 6:] = (
            other.state.ids[..., :4],
            other.state.ids[..., 6:],
        )
        blind = score(batch._replace(state=batch.state._replace(ids=changed)))
        seen = score(batch._replace(state=other.state))
    assert kernels == {
        "history/event/inner/kernel": (2 * 8 + 2, 32),
        "target/inner/kernel": (2 * 8, 32),
    }
    assert (scores == blind).all()
    assert not (scores == seen).all()


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({"soft": {"histories": ("tab",)}}, "did you mean 'history'"),
        ({"soft": {"history": ()}}, "is empty"),
        ({"soft": {"history": ("tab",)}, "text": {"history": ("tab",)}}, "contradict"),
    ],
)
def test_wrong_choices_of_soft_features_are_named(tokens, words):
    with pytest.raises(InputError, match=words):
        validate(tiny(fused=True, tokens=tokens))


def test_soft_features_need_one_token_per_event_and_must_exist():
    with pytest.raises(InputError, match="use True"):
        validate(tiny(tokens={"soft": {"history": ("tab",)}}))
    with (
        jax.set_mesh(one_device()),
        pytest.raises(InputError, match=r"soft\['candidate'\].*did you mean 'code'"),
    ):
        init_state(
            build_model(
                tiny(fused=True, tokens={"soft": {"candidate": ("codes",)}}),
                SCHEMA,
                LABELS,
            ),
            0,
        )


@pytest.fixture(scope="module")
def compared(data, ids, tmp_path_factory):
    """Flags and folder of a comparison of one arm, two steps long."""
    out = tmp_path_factory.mktemp("compared")
    flags = [
        "--task",
        "ranking",
        "--data",
        str(data),
        "--semantic-ids",
        str(ids),
        "--work",
        str(out / "work"),
    ]
    flags += ["--arms", "soft", "--events", str(EVENTS), "--out", str(out / "page")]
    with pytest.MonkeyPatch.context() as patch:
        # The process of the arm needs one device, and quick compilation.
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
        patch.setitem(TASKS, "ranking", RANKING)
        patch.setitem(soft_tokens.TITLES, "ranking", "Synthetic")
        patch.setitem(soft_tokens.EVENTS, "ranking", EVENTS)
        soft_tokens.main([*flags, "--requests", str(2 * BATCH)])
    return flags, out


@pytest.mark.slow
def test_an_arm_runs_is_written_and_is_not_run_twice(compared, monkeypatch):
    flags, out = compared
    row = json.loads((out / "page.json").read_text())["rows"][0]
    assert row["arm"] == "soft"
    assert row["requests seen"] == 2 * BATCH
    assert row["TFLOP in all"] == pytest.approx(
        row["MFLOP a request"] * row["requests seen"] / 1e6
    )
    assert row["requests / s"] == pytest.approx(BATCH / row["step, ms"] * 1e3)
    assert row["peak, MiB"] > row["step's temporaries, MiB"] > 0
    assert 0 <= float(row["AUC"]) <= 1
    page = (out / "page.md").read_text()
    assert ARMS["soft"].what in page

    monkeypatch.setattr(
        ProcessPoolExecutor, "submit", None
    )  # a second start must not come so far
    soft_tokens.main([*flags, "--requests", str(2 * BATCH)])
    assert (out / "page.md").read_text() == page
    with pytest.raises(InputError, match="other settings"):
        soft_tokens.main([*flags, "--requests", str(3 * BATCH)])


@pytest.mark.slow
def test_the_run_of_an_arm_shows_its_attention_and_its_events(compared, data):
    workdir = compared[1] / "work" / "ranking" / "soft_seed0"
    maps = attention_maps.run_maps(workdir, data, "valid", 8)
    rows = 1 + EVENTS + 1 + RANKING.candidates
    assert [weights.shape for weights in maps.weights] == [(8, 2, rows, rows)] * 4
    shown, roles = attention_maps.one_request(
        maps, int(np.argmax(maps.valid.sum(axis=1)))
    )
    assert roles == ["user", *["event"] * EVENTS, "query", "target"]
    np.testing.assert_allclose([weights.sum(axis=1) for weights in shown], 1, atol=1e-5)
    assert {row["reader"] for row in attention_maps.mass_rows("soft", maps)} == {
        "event",
        "target",
    }

    events = signal_probe.read_events(workdir, data, "valid", 64)
    count = len(events.tokens)
    assert 32 < count <= 64
    assert events.tokens.shape == events.fresh.shape == (count, 1, 64)
    assert not np.allclose(events.tokens, events.fresh)
    assert {"item", "semantic_id[0]", "price", "hour", "clicked", "seconds"} <= set(
        events.signals
    )
    values = np.array(
        [np.nan_to_num(signal.values, nan=-1.0) for signal in events.signals.values()]
    )
    assert len(np.unique(values, axis=1).T) > 0.9 * count


def record(costs, auc, gauc=0.5):
    return dict.fromkeys(soft_tokens.COSTS, costs) | {
        "metrics": {"AUC": auc, "GAUC": gauc}
    }


def test_costs_are_compared_as_multiples_and_metrics_seed_by_seed():
    records = {
        "text": [record(12, 0.70), record(36, 0.80)],
        "soft": [record(2, 0.71), record(6, 0.79, None)],
    }
    table, ratios = (
        soft_tokens.table_rows(records, {"popularity": {"AUC": 0.5, "GAUC": None}}),
        soft_tokens.ratio_rows(records),
    )
    assert table[0] == {"arm": "text", "seeds": 2} | dict.fromkeys(
        soft_tokens.COSTS, 24
    ) | {
        "AUC": "0.7500 ± 0.0707",
        "GAUC": "0.5000 ± 0.0000",
    }
    assert table[1]["GAUC"] == "-"
    differences = {"AUC, difference": "+0.0000 ± 0.0141", "GAUC, difference": "-"}
    assert ratios == [
        {"arm": "text / soft"} | dict.fromkeys(soft_tokens.COSTS, 6.0) | differences
    ]


def test_the_time_of_a_step_is_the_median_over_the_log_behind_the_compiler(tmp_path):
    times = [(5, 100.0), (10, 101.0), (15, 102.0), (20, 152.0), (25, 153.5)]
    lines = [{"step": step, "time": time, "train/loss": 1.0} for step, time in times]
    lines.insert(2, {"step": 10, "time": 101.9, "valid/macro_auc": 0.5})
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    assert soft_tokens.step_seconds(tmp_path) == pytest.approx(
        0.25
    )  # of 0.2, 0.2, 10 and 0.3
