"""Faults of `benchmarks/chaos.py`: real processes, a damaged and an unverified checkpoint;
and failures of `chaos.py` itself, which are results like others."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Never

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_run_under_faults_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    out = tmp_path / "chaos.json"
    flags = ["--faults", "1", "--seed", "3", "--steps", "40", "--json", str(out)]
    kinds = ["bit of a large file"]
    process = subprocess.run(
        [sys.executable, "benchmarks/chaos.py", *flags, "--kinds", *kinds],
        cwd=ROOT,
        # A script has its own folder on the path: without this it would import an
        # installed tokenrec, which may be another tree.
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(out.read_text()) == {
        "planned": 1,
        "faults": 1,
        "survived": 1,
        "refused_clearly": 0,
        "compared_runs": 1,
        "lost_samples": 0,
        "differing_bits": 0,
        "differing_evaluations": 0,
        "differing_progress": [],
        "failed": [],
        "by_kind": {kind: {"faults": 1, "survived": 1} for kind in kinds},
    }


@pytest.fixture
def chaos(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/chaos.py` as a module, with a lab that trains nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("chaos")
    monkeypatch.setattr(module.Lab, "__enter__", lambda lab: lab)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    return module


def run_in_process(
    chaos: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path
) -> dict[str, Any]:
    """Run `chaos.main` with two kinds, which must not succeed; return its result."""
    flags = [
        "--faults",
        "2",
        "--json",
        str(out),
        "--kinds",
        "SIGTERM",
        "kill in a save",
    ]
    monkeypatch.setattr(sys, "argv", ["chaos.py", *flags])
    assert chaos.main() == 1
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_an_error_inside_of_a_fault_is_a_result_and_the_others_go_on(
    chaos: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def breaks(lab: object) -> Never:
        raise RuntimeError("mount: no such device\nmore lines")

    monkeypatch.setitem(chaos.KINDS, "SIGTERM", breaks)
    monkeypatch.setitem(
        chaos.KINDS, "kill in a save", lambda lab: chaos.Outcome("survived", "")
    )
    result = run_in_process(chaos, monkeypatch, tmp_path / "chaos.json")
    assert result["faults"] == 2
    assert result["survived"] == 1
    (failed,) = result["failed"]
    assert failed.startswith("SIGTERM: chaos itself: test_chaos.py:")
    assert failed.endswith("RuntimeError: mount: no such device")


def test_a_lab_that_cannot_be_prepared_is_a_result(
    chaos: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def breaks(lab: object) -> Never:
        raise OSError("no space for the data set")

    monkeypatch.setattr(chaos.Lab, "__enter__", breaks)
    result = run_in_process(chaos, monkeypatch, tmp_path / "chaos.json")
    assert (result["planned"], result["faults"]) == (2, 0)
    (failed,) = result["failed"]
    assert failed.endswith("OSError: no space for the data set")


def test_what_was_measured_is_kept_when_a_run_is_cut_off(
    chaos: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "chaos.json"

    def cut_off(lab: object) -> Never:
        raise KeyboardInterrupt

    monkeypatch.setitem(
        chaos.KINDS, "SIGTERM", lambda lab: chaos.Outcome("survived", "")
    )
    monkeypatch.setitem(chaos.KINDS, "kill in a save", cut_off)
    monkeypatch.setattr(chaos, "draw_kinds", lambda *_: ["SIGTERM", "kill in a save"])
    with pytest.raises(KeyboardInterrupt):
        run_in_process(chaos, monkeypatch, out)
    result = json.loads(out.read_text())
    assert (result["planned"], result["faults"], result["survived"]) == (2, 1, 1)
