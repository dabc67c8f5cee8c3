"""One fault of `benchmarks/chaos.py`: real processes, and a flipped bit of a checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_run_whose_checkpoint_is_damaged_ends_as_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    out = tmp_path / "chaos.json"
    flags = ["--faults", "1", "--seed", "3", "--steps", "60", "--json", str(out)]
    process = subprocess.run(
        [
            sys.executable,
            "benchmarks/chaos.py",
            *flags,
            "--kinds",
            "bit of a checkpoint",
        ],
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
        "faults": 1,
        "survived": 1,
        "refused_clearly": 0,
        "lost_samples": 0,
        "differing_bits": 0,
        "failed": [],
        "by_kind": {"bit of a checkpoint": {"faults": 1, "survived": 1}},
    }
