"""Table rows of the collapse benchmark, from made-up records."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.collapse import (
    ARMS,
    EVENTS_ONLY,
    JOINT,
    TOKENFORMER,
    World,
    arm_config,
    measured,
    order_row,
    run_row,
    table_row,
)
from tokenrec.config.validate import validate
from tokenrec.errors import InputError
from tokenrec.runtime.files import write_json


def record(rank: float) -> dict[str, Any]:
    information = {
        task: {"100": {"corrected": nats}}
        for task, nats in (("click", 0.1), ("buy", 0.3))
    }
    layer = {"effective_rank": rank, "information": information}
    return {
        "auc": 0.7,
        "report": {
            "layers": {"tokens": layer | {"effective_rank": 20.0}, "layer_0": layer}
        },
    }


def test_orders_are_counted_seed_by_seed_in_the_last_layer():
    records = {
        EVENTS_ONLY: [record(9), record(9), record(1)],
        JOINT: [record(3), record(8), record(2)],
        TOKENFORMER: [record(6), record(7), record(5)],
    }
    assert order_row(World(2, 4.0), records) == {
        "profiles": 2,
        "weight": 4.0,
        "events only > naive joint": "2 of 3",
        "events only > TokenFormer": "2 of 3",
        "TokenFormer > naive joint": "2 of 3",
    }


def test_a_row_has_ranks_of_every_layer_and_the_mean_information_of_the_last():
    row = table_row(World(2, 4.0), JOINT, [record(3), record(5)], 0.8)
    assert row["rank, tokens"] == "20.0000 ± 0.0000"
    assert row["rank, layer_0"] == "4.0000 ± 1.4142"
    assert row["nats, layer_0"] == "0.2000 ± 0.0000"
    assert (row["arm"], row["AUC"], row["best AUC"]) == (JOINT, "0.7000 ± 0.0000", 0.8)


def test_a_run_is_kept_with_its_spectra_in_five_digits():
    made = record(3)
    for layer in made["report"]["layers"].values():
        layer["spectrum"] = [1.23456789, 1e-7]
    row = run_row(World(2, 4.0), JOINT, 1, made | {"auc": 2 / 3})
    assert {name: value for name, value in row.items() if name != "layers"} == {
        "rank": 2,
        "weight": 4.0,
        "arm": JOINT,
        "seed": 1,
        "auc": 0.66667,
    }
    assert row["layers"]["layer_0"] == {
        "effective_rank": 3,
        "nats": 0.2,
        "spectrum": [1.2346, 1e-7],
    }


def test_arms_differ_in_static_fields_windows_and_gate_alone(tmp_path):
    configs = {arm: validate(arm_config(arm, tmp_path, 0, 100)) for arm in ARMS}
    events, joint, ours = (configs[arm] for arm in ARMS)
    static = set(events.data.exclude) - set(joint.data.exclude)
    assert static == {*(f"field_{n}" for n in range(12)), "segment", "interests", "age"}
    assert joint.data.exclude == ours.data.exclude == ("clicked", "seconds")
    ours.model.windows, ours.model.gate = (), False
    events.data.exclude = joint.data.exclude
    assert events == joint == ours


def test_a_record_of_other_settings_is_refused_and_its_own_is_read(tmp_path):
    config = arm_config(JOINT, tmp_path, 0, 100)
    write_json(tmp_path / "collapse.json", {"config": asdict(config), "auc": 0.5})
    assert measured(config, tmp_path)["auc"] == 0.5
    config.optim.steps = 101
    with pytest.raises(InputError, match="was measured with other settings"):
        measured(config, tmp_path)
