"""The short form of `benchmarks/chaos.py`: real processes, a kill in a save and a bit of a checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_killed_and_a_damaged_run_end_as_an_undisturbed_one(tmp_path: Path) -> None:
    found = tmp_path / "chaos.json"
    line = ["benchmarks/chaos.py", "--faults", "2", "--seed", "3", "--steps", "60", "--json", str(found)]
    kinds = ["--kinds", "kill in a save", "bit of a checkpoint"]
    ended = subprocess.run([sys.executable, *line, *kinds], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    one = {"faults": 1, "survived": 1}
    assert json.loads(found.read_text()) == {
        **{"faults": 2, "survived": 2, "refused_clearly": 0, "lost_samples": 0, "differing_bits": 0, "failed": []},
        "by_kind": {"bit of a checkpoint": one, "kill in a save": one},
    }
