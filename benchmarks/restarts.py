"""Measure what saving costs a run, and how long a restart takes to its first step.

    python -m benchmarks.restarts --data DIR [--config kuairand_pure_uc] [--repeats 3]
                                  [--steps 120] [--save-every 20]
                                  [--checkpoints 1000]

Every run is a process of its own, started as a user would. Restarts resume from one
checkpoint, in turns without and with the compiled programs that the first start kept
(`train.keep_compiled`). They are timed from the start of the process to the log line of
the first step.

The cost of saves comes from a run that saves every `--save-every` steps. `blocked` is
the time that the loop waited. `share` is that time over the time of the steps between
two saves by the config's own `train.save_every`. `steps meanwhile` compares the two
steps after each save, while the checkpoint is written in the background, with the same
steps of a run that saves nothing.

Opening a folder with many kept checkpoints is timed in this process: `open` finds the
latest intact one, and `restore` reads it. The others are hard links of one checkpoint,
so that their files are in the page cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.report import run_script, write_result
from tokenrec.checkpoint.checkpointer import Checkpointer
from tokenrec.checkpoint.reader import CHECKPOINTS_FOLDER
from tokenrec.checkpoint.run_folder import open_model
from tokenrec.config.load import load_config
from tokenrec.errors import InputError
from tokenrec.runtime.metric_writer import METRICS_FILE, read_log
from tokenrec.sharding import make_mesh
from tokenrec.state import abstract_state

# A run that takes longer is killed and counts as failed.
LIMIT_SECONDS = 1_800


def start(workdir: Path, flags: argparse.Namespace, **fields: Any) -> float:
    """Train a run in a process of its own.

    Args:
      workdir: folder of the run.
      flags: flags of the command line.
      fields: fields of `train` in the config.

    Returns:
      Seconds from the start of the process to the first new step in the log.

    Raises:
      InputError: the run fails or makes no step.
    """
    values: dict[str, Any] = {
        "train.log_every": 1,
        "train.eval_every": 0,
        "train.eval_samples": 64,
    }
    values |= {f"train.{key}": value for key, value in fields.items()}
    line = [
        "train",
        f"--config={flags.config}",
        f"--data={flags.data}",
        f"--workdir={workdir}",
        "--quiet",
    ]
    line += [f"--config.{name}={value}" for name, value in values.items()]
    # A shared cache would hide the compilation.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "JAX_COMPILATION_CACHE_DIR"
    }
    steps_before = len(step_times(workdir))
    seconds_to_first_step = 0.0
    errors = workdir.with_suffix(".err")
    command = [sys.executable, "-m", "tokenrec", *line]
    start_time = time.monotonic()
    with (
        errors.open("w") as file,
        subprocess.Popen(command, env=environment, stdout=file, stderr=file) as run,
    ):
        while run.poll() is None and time.monotonic() < start_time + LIMIT_SECONDS:
            if not seconds_to_first_step and len(step_times(workdir)) > steps_before:
                seconds_to_first_step = time.monotonic() - start_time
            time.sleep(0.01)
        run.kill()
    if run.returncode or not seconds_to_first_step:
        raise InputError(
            f"the run in '{workdir}' ended with {run.returncode}: "
            f"{errors.read_text()[-2_000:]}"
        )
    return seconds_to_first_step


def records(workdir: Path) -> list[dict[str, Any]]:
    """Lines of the run's log."""
    return list(read_log(workdir / METRICS_FILE))


def step_times(workdir: Path) -> dict[int, float]:
    """Time at which each step was logged."""
    return {
        record["step"]: record["time"]
        for record in records(workdir)
        if "train/loss" in record
    }


def step_seconds(workdir: Path, blocked: dict[int, float]) -> dict[int, float]:
    """Seconds between the log lines of each step and the one before.

    Args:
      workdir: folder of the run.
      blocked: step -> seconds that its save blocked, which are subtracted.
    """
    logged = step_times(workdir)
    return {
        step: logged[step] - logged[step - 1] - blocked.get(step - 1, 0)
        for step in logged
        if step > 1
    }


def cost_of_saves(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """Compare a run that saves with one that does not; one row of the result."""
    # 1. Train both.
    workdir, without = folder / "saves", folder / "none"
    start(workdir, flags, stop_at=flags.steps, save_every=flags.save_every)
    start(without, flags, stop_at=flags.steps, save_every=0)
    blocked = {
        record["step"]: record["save/blocked_seconds"]
        for record in records(workdir)
        if "save/blocked_seconds" in record
    }
    # 2. The first steps and the first save include compilation and the start of threads.
    first = 2 * flags.save_every
    saving, alone = step_seconds(workdir, blocked), step_seconds(without, {})
    after_saves = [
        step for step in saving if step > first and (step - 1) % flags.save_every < 2
    ]
    waits = [
        seconds for step, seconds in blocked.items() if first <= step < flags.steps
    ]
    # 3. The share of the time at the config's own interval.
    every = load_config(flags.config, []).train.save_every
    usual = statistics.mean(seconds for step, seconds in alone.items() if step > first)
    share = statistics.mean(waits) / (every * usual)
    slowdown = statistics.median(saving[step] / alone[step] for step in after_saves)
    files = [
        path
        for path in (workdir / "checkpoints" / str(flags.steps)).rglob("*")
        if path.is_file()
    ]
    return {
        "what": "a save",
        "checkpoint, MB": round(sum(path.stat().st_size for path in files) / 1e6, 1),
        "saves": len(waits),
        "blocked, ms": round(1e3 * statistics.median(waits), 1),
        "longest, ms": round(1e3 * max(waits), 1),
        "a step, ms": round(1e3 * usual, 1),
        "share": f"{share:.3%} (every {every:,} steps)",
        "steps meanwhile": f"{slowdown:.2f}x",
    }


def restarts(folder: Path, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Time restarts with and without compiled programs; a row of the result for each."""
    first_run = folder / "begun"
    seconds: dict[str, list[float]] = {
        "the first start": [],
        "a restart that compiles": [],
        "with kept programs": [],
    }
    seconds["the first start"].append(start(first_run, flags, stop_at=4))
    for turn in range(flags.repeats):
        for name, keep_compiled in (
            ("a restart that compiles", False),
            ("with kept programs", True),
        ):
            copy = folder / f"{name} {turn}"
            shutil.copytree(first_run, copy)
            seconds[name].append(
                start(copy, flags, stop_at=6, keep_compiled=keep_compiled)
            )
    compiles = statistics.median(seconds["a restart that compiles"])
    return [
        {
            "what": name,
            "starts": len(times),
            "to the first step, s": round(statistics.median(times), 1),
            "of a restart that compiles": f"{statistics.median(times) / compiles:.2f}x",
        }
        for name, times in seconds.items()
    ]


def opening(folder: Path, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the opening of a run with one checkpoint and with many; a row for each."""
    workdir = folder / "many"
    start(workdir, flags, stop_at=4)
    (first,) = (workdir / CHECKPOINTS_FOLDER).iterdir()
    model, _ = open_model(workdir, flags.data)
    rows = []
    with jax.set_mesh(make_mesh(model.config.mesh, jax.devices())):
        abstract = abstract_state(model)
        for count in (1, flags.checkpoints):
            for step in range(int(first.name) + 1, int(first.name) + count):
                copy = first.with_name(str(step))
                shutil.copytree(first, copy, copy_function=os.link)
            opened, restored = [], []
            for _ in range(flags.repeats):
                began = time.perf_counter()
                with Checkpointer(workdir, keep=count) as checkpoints:
                    opened.append(time.perf_counter() - began)
                    checkpoints.restore(abstract)
                    restored.append(time.perf_counter() - began - opened[-1])
            rows.append(
                {
                    "what": f"{count:,} kept checkpoints",
                    "starts": flags.repeats,
                    "open, s": round(statistics.median(opened), 3),
                    "restore, s": round(statistics.median(restored), 3),
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder of the config's prepared data set",
    )
    parser.add_argument("--config", default="kuairand_pure_uc")
    parser.add_argument("--repeats", type=int, default=3, help="restarts of each kind")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument(
        "--checkpoints", type=int, default=1_000, help="kept in the run that is opened"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/restarts"),
        help="stem of the result files",
    )
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            cost_of_saves(Path(folder), flags),
            *restarts(Path(folder), flags),
            *opening(Path(folder), flags),
        ]
    command = (
        f"python -m benchmarks.restarts --data DIR --config {flags.config} "
        f"--repeats {flags.repeats} --steps {flags.steps} "
        f"--save-every {flags.save_every} --checkpoints {flags.checkpoints}"
    )
    write_result(
        flags.out,
        rows,
        {"config": flags.config},
        command,
        title="What it costs not to lose a run",
    )


if __name__ == "__main__":
    run_script(main)
