"""Tables of event states: their measurements, and their fit to the study."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import study_states
from benchmarks.stream_layouts import build_layout
from tests.analysis.study_folder import NAME, write_about, write_study
from tokenrec.analysis.attention_maps import AttentionMaps
from tokenrec.analysis.study_files import read_study
from tokenrec.analysis.study_rows import (
    TOKENS,
    EffectiveRank,
    LabelInformation,
    SingularValue,
)
from tokenrec.errors import InputError
from tokenrec.study.plan import TrainingRun


def test_tables_hold_what_was_measured_of_each_seed_at_the_chosen_rate(
    tmp_path, monkeypatch
):
    folder = write_study(tmp_path / "study", optional=False)
    read = []

    def report(workdir, split, **choice):
        read.append((workdir, split, choice["checkpoint"]))
        ranks = {"tokens": 8.0, "layer_0": 5.0}
        told = {"click": {"50": {"corrected": 0.125}}}
        layers = {
            name: {"effective_rank": rank, "spectrum": [rank, 1.0], "information": told}
            for name, rank in ranks.items()
        }
        return {"step": 4, "layers": layers}

    def maps(workdir, data, split, streams):
        layout = build_layout(
            user_tokens=1, events=2, fused=True, candidates=1, target_tokens=1
        )
        weights = np.zeros((2, 2, layout.length, layout.length))
        weights[:, 0, :, 0] = (
            1  # the first head sees the user, the second the newest event
        )
        weights[:, 1, :, 3] = 1
        return AttentionMaps(
            (weights,), layout, np.ones((2, layout.length), bool), np.arange(2), 4
        )

    monkeypatch.setattr(study_states, "collapse_report", report)
    monkeypatch.setattr(study_states, "run_maps", maps)
    study_states.main(["--study", str(folder), "--models", "rival"])
    assert read == [
        (folder / f"runs/rival/lr-0.01/seed-{seed}/run", "valid", "latest")
        for seed in range(3)
    ]
    files = read_study(folder)
    ranks = {TOKENS: 8.0, 0: 5.0}
    assert files.ranks == [
        EffectiveRank(NAME, "rival", seed, 4, *of)
        for seed in range(3)
        for of in ranks.items()
    ]
    assert [
        value for value in files.spectra if value.seed == 0 and value.layer == 0
    ] == [
        SingularValue(NAME, "rival", 0, 0, 0, 5.0),
        SingularValue(NAME, "rival", 0, 0, 1, 1.0),
    ]
    seen = {(mass.head, mass.source) for mass in files.attention if mass.value == 1}
    assert seen == {(0, "user"), (1, "event 1")}
    assert {mass.model for mass in files.attention} == {"rival"}
    assert [one for one in files.information if one.seed == 2] == [
        LabelInformation(NAME, "rival", 2, layer, "click", 50, 0.125) for layer in ranks
    ]
    rows = {cell.query for cell in files.maps}
    assert len(rows) == 6  # fewer than blocks: each row is shown
    assert {
        (cell.query, cell.key, cell.value) for cell in files.maps if cell.value
    } == {(row, key, 0.5) for row in rows for key in (0, 3)}
    flags = f"--study={folder} --models rival --split=valid --rows=4096"
    assert files.states_command == f"python -m benchmarks.study_states {flags}"


def test_a_map_in_blocks_is_the_mean_over_real_rows_and_the_sum_over_what_they_read():
    layout = build_layout(
        user_tokens=1, events=99, fused=True, candidates=1, target_tokens=1
    )
    size = layout.length
    random = np.random.default_rng(0)
    weights = random.dirichlet(np.ones(size), (2, 2, size))
    valid = random.random((2, size)) < 0.7
    valid[:, 10:20] = False
    cells = study_states.cell_rows(
        "s", "m", AttentionMaps((weights,), layout, valid, np.arange(2), 4)
    )
    first = sorted({cell["key"] for cell in cells})
    assert len(first) == study_states.BLOCKS
    ends = dict(zip(first, [*first[1:], size], strict=True))
    for cell in random.choice(cells, 50):
        rows, read = (
            slice(cell["query"], ends[cell["query"]]),
            slice(cell["key"], ends[cell["key"]]),
        )
        of_rows = weights[:, :, rows, read].sum(axis=3).mean(axis=1)[valid[:, rows]]
        np.testing.assert_allclose(cell["value"], of_rows.mean(), rtol=1e-12)
    assert first[4] not in {cell["query"] for cell in cells}  # no row of it is real


def test_all_trained_models_are_measured_unless_some_are_named(tmp_path):
    folder = write_study(tmp_path / "study", optional=False)
    files = read_study(folder)
    jobs = study_states.measured_runs(files, [])
    assert {job.model for job in jobs} == {"ours", "rival", "plain"}
    assert len(jobs) == 9
    assert TrainingRun("rival", 0.01, 2) in jobs
    assert TrainingRun("ours", 0.01, 0) not in jobs
    with pytest.raises(
        InputError, match="--models rivl has no run in this study; did you mean 'rival'"
    ):
        study_states.measured_runs(files, ["rivl"])
    write_about(folder, arms={"ours": {}, "rival": {"model.kind": "hstu"}, "plain": {}})
    files = read_study(folder)
    assert {job.model for job in study_states.measured_runs(files, [])} == {
        "ours",
        "plain",
    }
    with pytest.raises(InputError, match=r"--models rival is of model\.kind='hstu'"):
        study_states.measured_runs(files, ["rival"])
