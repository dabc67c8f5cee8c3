"""The kept page of a study, and the report from its copied tables."""

from __future__ import annotations

import json

from benchmarks import studies
from tests.analysis.study_folder import NAME, write_study
from tokenrec.analysis.study_files import read_study
from tokenrec.analysis.summary import summarize_study


def test_a_kept_study_can_be_reported_again_and_its_page_has_a_row_for_each_model(
    tmp_path,
):
    folder = write_study(tmp_path / "study")
    (folder / "runs").mkdir()
    studies.main(["--study", str(folder), "--out", str(tmp_path / "kept")])
    again = read_study(tmp_path / "kept" / NAME)
    assert again == read_study(folder)
    assert not (tmp_path / "kept" / NAME / "runs").exists()
    kept = json.loads((tmp_path / "kept" / f"{NAME}.json").read_text())
    assert kept["command"] == again.info.command
    models = [row["model"] for row in kept["rows"]]
    assert set(models) == {row.model for row in again.results}
    ours, rival = (
        next(row for row in kept["rows"] if row["model"] == model)
        for model in ("ours", "rival")
    )
    assert (rival["rate"], rival["seeds"], rival["click auc"]) == (
        0.01,
        3,
        "0.7400 ± 0.0173",
    )
    assert rival["click auc - ours"] == "+0.0200 [+0.0050, +0.0350]"
    assert ours["click auc - ours"] is None
    gaps = studies.seed_gaps(again, summarize_study(again), "test")
    assert gaps.pop("plain").endswith("(p = 1)")
    assert gaps == {"rival": "+0.0300 +0.0100 +0.0200 (p = 0.074)"}
    assert "rare auc - ours" not in rival  # 57 positives
    assert "rare" in kept["params"]["nothing is claimed of"]
    assert kept["params"]["not finished"] == "nothing"
