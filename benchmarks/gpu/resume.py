"""A run that is stopped and resumed against one that is not, bit for bit.

Each part is a process of its own, `tokenrec train` on a small synthetic data set: the
whole run, the whole run once more, and a run that stops half-way and is resumed. Sums
by atomic additions, and matrix products chosen by timing, may give a GPU other bits in
each process. So all is done with XLA's default flags, and again with
`--xla_gpu_deterministic_ops`.
"""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from benchmarks.gpu.record import FAIL, PASS, Recorder
from tokenrec.checkpoint.run_folder import load_run_config, open_run
from tokenrec.sharding import make_mesh

TABLE = "resume"
STEPS = 8
# Name -> XLA flags that are added.
VARIANTS = {
    "default flags": "",
    "deterministic": "--xla_gpu_deterministic_ops=true",
}


def tokenrec(words: list[str], flags: str = "") -> None:
    """Run a `tokenrec` command.

    Raises:
      RuntimeError: it failed; the message ends with what it printed.
    """
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        # The stage's own process and other parts use the device at the same time.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tokenrec", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"tokenrec {words[0]} ended with {done.returncode}: {done.stderr[-500:]}"
        )


def train(data: Path, workdir: Path, flags: str, *, stop_at: int = 0) -> None:
    """Train in a process of its own; a folder with a checkpoint is resumed."""
    config = {
        "optim.steps": STEPS,
        "optim.warmup_steps": 2,
        "data.batch_size": 8,
        "data.overlap": 8,
        "model.dropout": 0.1,
        "train.eval_split": "",
        "train.save_every": STEPS,
        "train.stop_at": stop_at,
    }
    tokenrec(
        [
            *("train", "--quiet", "--config=synthetic"),
            *("--data", str(data), "--workdir", str(workdir)),
            *(f"--config.{name}={value}" for name, value in config.items()),
        ],
        flags,
    )


def stop_and_resume(data: Path, workdir: Path, flags: str) -> None:
    """Train half of the steps, and the rest in another process."""
    train(data, workdir, flags, stop_at=STEPS // 2)
    train(data, workdir, flags)


class Runs:
    """All runs, in the background: a context manager that waits for them.

    Args:
      folder: for data and runs.
      rehearse: one variant, and the whole run only once.
    """

    def __init__(self, folder: Path, *, rehearse: bool) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=6)
        self._folder = folder
        self._variants = list(VARIANTS)[:1] if rehearse else list(VARIANTS)
        self._again = not rehearse
        self._prepared = self._pool.submit(
            tokenrec,
            ["prepare", "synthetic", "--rows", "4000", "--out", str(folder / "data")],
        )
        self._runs = {
            (variant, part): self._pool.submit(self._run, variant, part)
            for variant in self._variants
            for part in ("whole", "parts", *(["again"] if self._again else []))
        }

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, variant: str, part: str) -> None:
        self._prepared.result()
        run = stop_and_resume if part == "parts" else train
        run(self._folder / "data", self._workdir(variant, part), VARIANTS[variant])

    def _workdir(self, variant: str, part: str) -> Path:
        return self._folder / f"{variant} {part}".replace(" ", "_")

    def compare(self, recorder: Recorder) -> None:
        """Add a row for each variant: the same run again, and the resumed run."""
        for variant in self._variants:
            compared = {"again": "the same run again"} if self._again else {}
            compared |= {"parts": f"stopped at {STEPS // 2} of {STEPS} and resumed"}
            for part, text in compared.items():
                row = {"variant": variant, "against the whole run": text}
                with recorder.case(table=TABLE, **row):
                    for name in ("whole", part):
                        self._runs[variant, name].result(max(recorder.remaining(), 0))
                    whole, other = (
                        leaves(self._workdir(variant, name)) for name in ("whole", part)
                    )
                    numbers, largest = differing(whole, other)
                    recorder.add(
                        table=TABLE,
                        **row,
                        numbers=sum(leaf.size for leaf in whole),
                        numbers_that_differ=numbers,
                        largest_difference=largest,
                        result=FAIL if numbers else PASS,
                    )


def leaves(workdir: Path) -> list[np.ndarray]:
    """All arrays of the latest checkpoint, restored on the CPU."""
    config = load_run_config(workdir, None)
    with jax.set_mesh(make_mesh(config.mesh, jax.devices("cpu")[:1])):
        state = open_run(workdir, "latest", None).state
        return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def differing(first: list[np.ndarray], second: list[np.ndarray]) -> tuple[int, float]:
    """Count the numbers that differ, and find the largest difference."""
    count, largest = 0, 0.0
    for a, b in zip(first, second, strict=True):
        count += int(np.sum(a != b))
        largest = max(largest, float(np.max(np.abs(a - b), initial=0.0)))
    return count, largest
