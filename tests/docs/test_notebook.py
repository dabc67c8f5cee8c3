"""The quick-start notebook runs from its first cell to its last, with small sizes."""

import json
from pathlib import Path

import matplotlib
import pytest

# Devices are not the matter here.
pytestmark = pytest.mark.usefixtures("lone_device")

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "quickstart.ipynb"


def code_cells() -> list[tuple[str, list[str]]]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [
        ("".join(cell["source"]), cell["metadata"].get("tags", []))
        for cell in cells
        if cell["cell_type"] == "code"
    ]


def test_the_quick_start_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for source, tags in code_cells():
        exec(compile(source, str(NOTEBOOK), "exec"), names)
        if "parameters" in tags:
            names |= {"rows": 6_000, "steps": 20}
    report = names["report"]
    assert isinstance(report, dict)
    assert any("ceiling" in name for name in report["baselines"])
    vectors = names["vectors"]
    assert vectors.column_names == ["item_id", "vector"]  # type: ignore[attr-defined]
    assert names["probabilities"].shape[-1] == 2  # type: ignore[attr-defined]


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
