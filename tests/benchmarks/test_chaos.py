"""The short form of `benchmarks/chaos.py`: real processes, one stopped by SIGTERM, and a bit of its checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_run_whose_checkpoint_is_damaged_ends_as_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    found = tmp_path / "chaos.json"
    line = [
        "benchmarks/chaos.py",
        "--faults",
        "1",
        "--seed",
        "3",
        "--steps",
        "60",
        "--json",
        str(found),
    ]
    kinds = ["--kinds", "bit of a checkpoint"]
    ended = subprocess.run(
        [sys.executable, *line, *kinds],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(found.read_text()) == {
        **{
            "faults": 1,
            "survived": 1,
            "refused_clearly": 0,
            "lost_samples": 0,
            "differing_bits": 0,
            "failed": [],
        },
        "by_kind": {"bit of a checkpoint": {"faults": 1, "survived": 1}},
    }
