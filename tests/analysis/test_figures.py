"""What single figures of a study show."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.analysis.study_folder import write_study
from tokenrec.analysis.figure_style import assign_styles
from tokenrec.analysis.study_files import read_study
from tokenrec.analysis.summary import summarize_study

pytest.importorskip("matplotlib")

from tokenrec.analysis.figures import draw_curves, draw_information, draw_maps


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


def test_twenty_models_have_twenty_styles() -> None:
    styles = assign_styles(map(str, range(20)))
    assert len({(s.colour, str(s.line)) for s in styles.values()}) == 20
