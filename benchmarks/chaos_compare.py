"""Compare runs of `chaos.py`: their logs, their progress and their weights."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokenrec.checkpoint.progress import Progress
from tokenrec.checkpoint.reader import CheckpointReader
from tokenrec.checkpoint.run_folder import open_run
from tokenrec.config import from_json
from tokenrec.runtime.metric_writer import METRICS_FILE, read_log
from tokenrec.sharding import make_mesh

# Bytes at the end of a log that hold a whole line of a step.
_TAIL_BYTES = 16_384
# Logged with every step, also with one whose update is skipped.
_EVERY_STEP = "train/learning_rate"
# Speeds differ from run to run.
_TIMINGS = ("examples_per_second", "seconds", "mfu")


@dataclasses.dataclass
class Differences:
    """Differences of disturbed runs from undisturbed ones.

    Attributes:
      runs: number of compared runs.
      lost_samples: samples of steps whose lines differ, are missing or are logged twice.
      bits: bits of the last and of the best state that differ.
      evaluations: lines of evaluations that differ, are missing or are logged twice.
      progress: values that differ, such as the best step or the number of skipped steps.
    """

    runs: int = 0
    lost_samples: int = 0
    bits: int = 0
    evaluations: int = 0
    progress: list[str] = dataclasses.field(default_factory=list)

    def compare(self, whole: Path, other: Path, batch_size: int) -> None:
        """Add the differences of two runs.

        Args:
          whole: folder of the undisturbed run.
          other: folder of the disturbed run.
          batch_size: samples of a step.
        """
        expected, found = _lines(whole), _lines(other)
        differing = [
            key
            for key in expected.keys() | found.keys()
            if expected.get(key) != found.get(key)
        ]
        steps = sum(prefix == "train" for _, prefix in differing)
        self.lost_samples += batch_size * steps
        self.evaluations += len(differing) - steps
        before, after = progress(whole), progress(other)
        for name, value in dataclasses.asdict(before).items():
            if getattr(after, name) != value:
                self.progress.append(f"{name}: {getattr(after, name)}, not {value}")
        self.bits += sum(
            differing_bits(whole, other, which) for which in ("latest", "best")
        )
        self.runs += 1

    def __bool__(self) -> bool:
        return bool(self.lost_samples or self.bits or self.evaluations or self.progress)


def last_step(workdir: Path) -> int:
    """Last step in the log of a run; 0 without one. It reads the end of the log only."""
    try:
        with (workdir / METRICS_FILE).open("rb") as log:
            size = log.seek(0, 2)
            log.seek(max(0, size - _TAIL_BYTES))
            lines = log.read().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        if line.endswith(b"\n") and _EVERY_STEP.encode() in line:
            try:
                return int(json.loads(line)["step"])
            # The first line of the tail is cut.
            except ValueError:
                return 0
    return 0


def step_time(workdir: Path, step: int) -> float | None:
    """Time at which a step was logged; None if it is not in the log."""
    for record in read_log(workdir / METRICS_FILE):
        if record["step"] == step and _EVERY_STEP in record:
            return float(record["time"])
    return None


def losses(workdir: Path) -> dict[int, list[float | None]]:
    """Losses in the log by step: None if the update was skipped; two if logged twice."""
    by_step: dict[int, list[float | None]] = {}
    for record in read_log(workdir / METRICS_FILE):
        if _EVERY_STEP in record:
            by_step.setdefault(record["step"], []).append(record.get("train/loss"))
    return by_step


def progress(workdir: Path) -> Progress:
    """Progress of the latest checkpoint."""
    with CheckpointReader(workdir) as reader:
        return reader.progress(reader.steps[-1])


def differing_bits(whole: Path, other: Path, which: str) -> int:
    """Count the bits of two states that differ; the step is one of the arrays.

    Args:
      whole: folder of the undisturbed run.
      other: folder of the disturbed run.
      which: the checkpoint, "latest" or "best".
    """
    count = 0
    states = [_state(path, which) for path in (whole, other)]
    for a, b in zip(*states, strict=True):
        if a.shape == b.shape and a.dtype == b.dtype:
            count += int(np.bitwise_count(a.view(np.uint8) ^ b.view(np.uint8)).sum())
        else:
            count += 8 * a.nbytes
    return count


def _lines(workdir: Path) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Lines of the log by step and prefix, without times and speeds."""
    lines = collections.defaultdict(list)
    for record in read_log(workdir / METRICS_FILE):
        step = record["step"]
        values = {
            name: value
            for name, value in record.items()
            if name not in ("step", "time") and not name.endswith(_TIMINGS)
        }
        # Nothing is left of a line about a save.
        if values:
            lines[step, next(iter(values)).partition("/")[0]].append(values)
    return dict(lines)


def _state(workdir: Path, which: str) -> list[np.ndarray]:
    config = from_json((workdir / "config.json").read_text())
    config.mesh.data = 1
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
        state = open_run(workdir, which, None).state
        return [np.atleast_1d(np.asarray(leaf)) for leaf in jax.tree.leaves(state)]
