"""The content of single figures of a study, and the styles of its models."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from tests.analysis.study_folder import write_study
from tokenrec.analysis.model_styles import assign_styles, legend_key
from tokenrec.analysis.study_files import read_study
from tokenrec.analysis.study_metrics import MetricKey
from tokenrec.analysis.summary import summarize_study

pytest.importorskip("matplotlib")

from tokenrec.analysis.attention_figures import draw_maps
from tokenrec.analysis.quality_figures import (
    draw_curves,
    draw_quality,
    draw_reliability,
)
from tokenrec.analysis.state_figures import draw_information


def test_maps_show_a_panel_of_each_layer_and_leave_out_what_is_not_read(
    tmp_path: Path,
) -> None:
    files = read_study(write_study(tmp_path / "s"))
    drawing = draw_maps(files.maps, summarize_study(files))
    axes = drawing.figure.axes
    assert [ax.get_title() for ax in axes] == [
        f"{model}, layer {n}" for model in ("ours", "rival", "plain") for n in (0, 1)
    ]
    shown = axes[0].images[0].get_array()
    assert shown.mask.tolist() == [[False, True], [False, False]]
    assert shown[1].tolist() == [0.5, 0.5]

    shallow = [cell for cell in files.maps if (cell.model, cell.layer) != ("rival", 1)]
    titles = [
        ax.get_title() for ax in draw_maps(shallow, summarize_study(files)).figure.axes
    ]
    assert titles == [
        "ours, layer 0",
        "ours, layer 1",
        "rival, layer 0",
        "plain, layer 0",
        "plain, layer 1",
    ]


def test_information_is_that_of_the_top_layer(tmp_path: Path) -> None:
    files = read_study(write_study(tmp_path / "s"))
    summary = summarize_study(files)
    (panel,) = draw_information(
        files.information, summary, assign_styles(summary.models)
    ).figure.axes
    assert panel.get_title() == "click"
    assert [line.get_ydata().tolist() for line in panel.lines] == [
        pytest.approx([0.12, 0.11])
    ] * 3


def test_learning_curves_have_the_logged_rank_of_the_top_layer(tmp_path: Path) -> None:
    files = read_study(write_study(tmp_path / "s"))
    summary = summarize_study(files)
    drawing = draw_curves(files.curves, summary, assign_styles(summary.models))
    assert [ax.get_title() for ax in drawing.figure.axes] == [
        "train/loss",
        "valid/macro_auc",
        "rank/layer_10",
    ]


def test_reliability_is_the_mean_over_seeds_beside_the_diagonal(
    tmp_path: Path,
) -> None:
    files = read_study(write_study(tmp_path / "s"))
    summary = summarize_study(files)
    styles = assign_styles(summary.models)
    (panel,) = draw_reliability(files.reliability, summary, styles).figure.axes
    assert panel.get_title() == "click"
    diagonal, *lines = panel.lines
    assert diagonal.get_xdata()[1] == diagonal.get_ydata()[1] == pytest.approx(0.6)
    assert len(lines) == 3
    for line in lines:
        assert list(line.get_xdata()) == pytest.approx([0.2, 0.6])
        assert list(line.get_ydata()) == pytest.approx([0.2, 0.5])
    valid = [row for row in files.reliability if row.split == "valid"]
    assert draw_reliability(valid, summary, styles) is None


def test_twenty_models_differ_in_every_kind_of_figure_and_in_tables() -> None:
    styles = assign_styles(map(str, range(20))).values()
    lines = {(style.colour, style.dashes) for style in styles}
    points = {(style.colour, style.marker, style.filled) for style in styles}
    # Hollow and filled markers of one shape and colour differ too little when small.
    shapes = {(style.colour, style.marker) for style in styles}
    keys = set(map(legend_key, styles))
    assert len(lines) == len(points) == len(shapes) == len(keys) == 20


@pytest.mark.parametrize(
    ("low", "high"),
    [(30e6, 88e6), (60.5e6, 65.4e6), (1e6, 9e9), (2e6, 8e6), (8e7, 1.3e9), (5e6, 5e6)],
)
def test_labels_of_the_flops_axis_do_not_collide(
    tmp_path: Path, low: float, high: float
) -> None:
    files = read_study(write_study(tmp_path / "s"))
    summary = summarize_study(files)
    # Three panels in a row, as narrow as they get.
    summary = dataclasses.replace(
        summary,
        tasks={"test": ("click", "other", "third")},
        no_claim={},
        spreads={
            MetricKey("test", task, "auc"): summary.spreads["test", "click", "auc"]
            for task in ("click", "other", "third")
        },
    )
    flops = {"ours": low, "rival": high}
    figure = draw_quality(flops, summary, assign_styles(summary.models)).figure
    figure.draw_without_rendering()
    for ax in figure.axes:
        boxes = [
            label.get_window_extent()
            for label in ax.get_xticklabels()
            if label.get_text()
        ]
        assert len(boxes) >= (3 if high > low else 1)
        for left, right in itertools.pairwise(boxes):
            assert left.x1 + 2 < right.x0
