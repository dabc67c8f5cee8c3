"""Stage 6: `kuairand_pure_uc` trained whole, its wall time and its AUC.

    python -m benchmarks.gpu.train --out OUT [--rehearse]

The prepared data set travels in an ignored folder, 45 MiB, made beforehand by

    tokenrec prepare kuairand --root DIR --out benchmarks/gpu/data/kuairand_pure \\
        --valid-from 2022-05-03 --test-from 2022-05-05

"train" is `tokenrec train` in a process of its own, compilation, evaluation and
checkpoints included. Where the time runs out, it is stopped by SIGTERM, and
`whole_seconds` is what all steps would take. "train, AUC" compares the AUC on 3 and 4
May with the seeds of `benchmarks/results/kuairand_pure_seeds.json`, trained on a CPU:
it passes within three sample deviations of their mean. A rehearsal trains a small model
on synthetic data.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.record import ERROR, LEFT_OUT, Recorder, run_stage
from tokenrec.runtime.metric_writer import METRICS_FILE, read_log

DATA = Path(__file__).parent / "data" / "kuairand_pure"
CONFIG, SEED = "kuairand_pure_uc", 0
CPU_RESULT = Path(__file__).parents[1] / "results" / "kuairand_pure_seeds.json"
REHEARSED_CONFIG = (
    "--config.optim.steps=12",
    "--config.optim.warmup_steps=2",
    "--config.train.eval_every=0",
    "--config.train.log_every=4",
    "--config.data.batch_size=8",
)
# Seconds before the end of the stage at which training is stopped, and those that a
# stopped run has to save its state.
STOP_BEFORE, SAVE_SECONDS = 15, 12
DEVIATIONS = 3


class Trained(NamedTuple):
    """What a training process left.

    Attributes:
      code: exit status.
      seconds: wall time.
      stopped: whether it was stopped for want of time.
      records: its `metrics.jsonl`.
      steps: steps of the whole run.
      error: the end of what it printed.
    """

    code: int
    seconds: float
    stopped: bool
    records: list[dict[str, Any]]
    steps: int
    error: str


def train(words: Sequence[str], workdir: Path, seconds: float | None) -> Trained:
    """Train in a process of its own, and stop it after so many seconds.

    Args:
      words: arguments of `tokenrec train` besides the folder.
      workdir: folder of the run.
      seconds: None: without a limit.
    """
    command = [sys.executable, "-m", "tokenrec", "train", "--quiet", *words]
    begin, stopped = time.perf_counter(), False
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, f"--workdir={workdir}"], stdout=log, stderr=log, text=True
        )
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            stopped = True
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=SAVE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        wall = time.perf_counter() - begin
        log.seek(0)
        error = " ".join(log.read()[-500:].split())
    config = workdir / "config.json"
    steps = json.loads(config.read_text())["optim"]["steps"] if config.is_file() else 0
    records = list(read_log(workdir / METRICS_FILE))
    return Trained(process.returncode, wall, stopped, records, steps, error)


def cost_row(trained: Trained) -> dict[str, Any]:
    """Steps, wall time and rates of a run that has logged some steps."""
    logged = [r for r in trained.records if "train/step_seconds" in r]
    if not logged:
        if trained.stopped:
            reason = f"stopped after {trained.seconds:.0f} s, before the first log line"
            return {"result": LEFT_OUT, "reason": reason}
        return {"result": ERROR, "reason": f"no step was logged: {trained.error}"}
    # The first lines hold the compilation of each stream length.
    steady = logged[len(logged) // 2 :]
    step_seconds = statistics.median(r["train/step_seconds"] for r in steady)
    done = logged[-1]["step"]
    return {
        "steps": done,
        "of": trained.steps,
        "wall_seconds": trained.seconds,
        "whole_seconds": trained.seconds + (trained.steps - done) * step_seconds,
        "step_ms": 1e3 * step_seconds,
        "examples_per_second": statistics.median(
            r["train/examples_per_second"] for r in steady
        ),
        "stopped": trained.stopped,
    }


def aucs(trained: Trained) -> dict[str, float]:
    """AUC of each task in the last evaluation; empty without one."""
    found: dict[str, float] = {}
    for record in trained.records:
        for name, value in record.items():
            if name.startswith("valid/") and name.endswith("/auc"):
                found[name.split("/")[1]] = value
    return found


def cpu_aucs(task: str) -> list[float]:
    """AUC of a task of each seed that was trained on a CPU."""
    rows = json.loads(CPU_RESULT.read_text())["rows"]
    return [row[f"{task} auc"] for row in rows if row["config"] == "uc"]


def add_aucs(recorder: Recorder, found: dict[str, float]) -> None:
    """Compare the AUC of each task with that of the CPU's seeds."""
    for task, auc in found.items():
        row: dict[str, Any] = {"table": "train, AUC", "task": task, "auc": auc}
        if recorder.rehearse:
            recorder.add(**row)
            continue
        seeds = cpu_aucs(task)
        mean, deviation = statistics.mean(seeds), statistics.stdev(seeds)
        recorder.check(
            abs(auc - mean),
            DEVIATIONS * deviation,
            **row,
            cpu_mean=mean,
            cpu_deviation=deviation,
        )


def measure(recorder: Recorder) -> None:
    """Add the rows of this stage."""
    with tempfile.TemporaryDirectory() as folder:
        if recorder.rehearse:
            data = Path(folder) / "data"
            words = ["prepare", "synthetic", "--rows", "4000", "--out", str(data)]
            subprocess.run(
                [sys.executable, "-m", "tokenrec", *words],
                check=True,
                capture_output=True,
            )
            words = ["--config=synthetic", f"--data={data}", *REHEARSED_CONFIG]
            name = "synthetic"
        elif not DATA.is_dir():
            reason = (
                "no benchmarks/gpu/data/kuairand_pure: `python -m benchmarks.gpu.train "
                "--help` says how to make it"
            )
            recorder.add(config=CONFIG, result=LEFT_OUT, reason=reason)
            return
        else:
            words = [f"--config={CONFIG}", f"--data={DATA}", f"--config.seed={SEED}"]
            name = CONFIG
        limited = recorder.remaining() < float("inf")
        limit = max(recorder.remaining() - STOP_BEFORE, 1) if limited else None
        trained = train(words, Path(folder) / "run", limit)
    recorder.add(config=name, **cost_row(trained))
    if trained.code != 0 and not trained.stopped:
        reason = f"tokenrec train ended with {trained.code}: {trained.error}"
        recorder.add(config=name, result=ERROR, reason=reason)
    add_aucs(recorder, aucs(trained))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage."""
    return run_stage("train", __doc__, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
