"""Every row that `tokenrec predict` scores is a request that the artifact scores alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.serving_equality import main
from tokenrec.evaluation.predict import predict_run


# Some rows: test_scorer.py, test_golden_requests_have_the_scores_of_predict.
@pytest.mark.slow
def test_all_rows_of_a_split(exported_run: tuple[Path, Path], tmp_path: Path) -> None:
    run, artifact = exported_run
    expected = tmp_path / "expected.parquet"
    rows = predict_run(run, "test", "best", None, expected)
    command = (
        f"--name tiny --workdir {run} --model {artifact} --work {tmp_path / 'work'}"
    )
    main([*command.split(), "--expected", str(expected)])
    row = json.loads((tmp_path / "work" / "tiny.json").read_text())
    assert row["rows"] == row["rows of predict"] == rows
    assert row["scores"] == 2 * rows
    assert row["without a score"] == row["beyond 1e-6"] == 0
    table = pq.read_table(expected)
    # A score that is not that of `predict` is found.
    place = table.column_names.index("score_click")
    wrong = np.array(table["score_click"])
    wrong[7] += 1e-4
    pq.write_table(table.set_column(place, "score_click", pa.array(wrong)), expected)
    with pytest.raises(SystemExit):
        main([*command.replace("tiny", "off").split(), "--expected", str(expected)])
    off = json.loads((tmp_path / "work" / "off.json").read_text())
    assert off["beyond 1e-6"] == 1
