"""The config of the runs of `chaos.py`."""

from __future__ import annotations

from typing import Any

BATCH = 16
# Log rows of the data set.
ROWS = 1_500
# Files above this size are read in pieces, by us and by the libraries.
LARGE_FILE = 1 << 16
# Runs of several processes are slower, and have fewer steps.
SHARES_OF_STEPS = {1: 1, 2: 2, 4: 3}
FEWEST_STEPS = 60
HANG_SECONDS = 45
# Small, but with a file of weights above LARGE_FILE. Steps are skipped as spikes, and the
# best evaluation is not the last one.
TINY: dict[str, Any] = {
    "model.width": 32,
    "model.heads": 2,
    "model.layers": 1,
    "model.windows": "()",
    "tokens.maker": "linear",
    "tokens.embedding_dim": 8,
    "data.paradigm": "nio",
    "data.overlap": 0,
    "data.events": 4,
    "data.batch_size": BATCH,
    "data.eval_batch_size": 32,
    "optim.warmup_steps": 1,
    "optim.table_learning_rate": 0.05,
    "optim.spike_norm": 1.05,
    "optim.max_skipped": 1_000_000,
    "train.save_every": 5,
    "train.log_every": 1,
    "train.keep": 3,
    "train.hang_seconds": HANG_SECONDS,
}
# Evaluations of a run, and `train.patience`.
EVALUATIONS = 12
PATIENCE = 10


def steps_of(steps: int, processes: int) -> int:
    """Steps of a run of some processes.

    Args:
      steps: those of a run of one process.
      processes: number of processes that train it together.
    """
    return max(FEWEST_STEPS, steps // SHARES_OF_STEPS[processes])


def run_config(steps: int, processes: int) -> dict[str, Any]:
    """Config fields of a run of some processes, by their names; see `steps_of`."""
    own_steps = steps_of(steps, processes)
    return TINY | {
        "optim.steps": own_steps,
        "train.eval_every": own_steps // EVALUATIONS,
        "train.patience": PATIENCE,
    }
