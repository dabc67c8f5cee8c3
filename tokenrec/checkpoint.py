"""Saving and restoring a run: the only file that knows Orbax.

A checkpoint is (step, state, progress); `progress` is what the loop knows besides: the best value and how long ago it
was. The step is the position in the data too, so that any number of processes may go on. All processes take part.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import TracebackType
from typing import Any

from orbax.checkpoint import v1 as ocp

from tokenrec import processes
from tokenrec.errors import InputError
from tokenrec.state import TrainState

FOLDER = "checkpoints"


@dataclasses.dataclass
class Progress:
    """What decides the best checkpoint and early stopping. `best` is higher for better, None before any evaluation."""

    best: float | None = None
    best_step: int = -1
    waited: int = 0


class Checkpoints:
    """The checkpoints of a run; the latest `keep` and the best stay. A context manager: leaving it ends a save."""

    def __init__(self, workdir: Path, *, keep: int) -> None:
        policies = ocp.training.preservation_policies
        best = policies.BestN(get_metric_fn=_value, n=1, keep_checkpoints_without_metrics=False)
        self._folder = Path(workdir).absolute() / FOLDER
        self._orbax = ocp.training.Checkpointer(
            self._folder, preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best])
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._orbax.close()

    @property
    def steps(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluated checkpoint, the earliest of equals; None if none was evaluated."""
        evaluated = [(_value(c.metrics), -c.step) for c in self._orbax.checkpoints if c.metrics]
        return -max(evaluated)[1] if evaluated else None

    def save(self, step: int, state: TrainState, progress: Progress, value: float | None) -> None:
        """Starts to save in the background; `value` is the evaluation of this step, if it had one."""
        if step in self.steps:
            return
        metrics = None if value is None else {"value": value}
        self._orbax.save_checkpointables_async(
            step,
            {"state": state},
            force=True,
            metrics=metrics,
            custom_metadata=dataclasses.asdict(progress),
        )

    def restore(self, abstract: TrainState) -> tuple[int, TrainState, Progress] | None:
        """The latest checkpoint, laid out as `abstract`; None if there is none."""
        step = processes.of_first(self.steps[-1] if self.steps else -1)
        if step < 0:
            return None
        loaded = self._orbax.load_checkpointables(step, {"state": abstract})
        kept = self._orbax.checkpointables_metadata(step).custom_metadata
        return step, loaded["state"], Progress(**kept)

    def load_state(self, which: str, abstract: TrainState) -> tuple[int, TrainState]:
        """The state of checkpoint "best", "latest" or a step number; "best" is the latest if none was evaluated.

        Raises:
          InputError: no such checkpoint.
        """
        with processes.all_or_none():
            step = self._choose(which)
        step = processes.of_first(step)  # a run that goes on may save in between
        return step, self._orbax.load_checkpointables(step, {"state": abstract})["state"]

    def _choose(self, which: str) -> int:
        steps = self.steps
        if not steps:
            raise InputError(f"'{self._folder}' holds no checkpoint; train first, or check --workdir")
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = self.best_step
            return steps[-1] if best is None else best
        if which.isdecimal() and int(which) in steps:
            return int(which)
        raise InputError(f"checkpoint '{which}' is not there; use best, latest, or one of {steps}")


def _value(metrics: Any) -> float:
    return metrics["value"]
