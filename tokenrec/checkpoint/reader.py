"""Read the checkpoints of a run.

This package is the only one that uses Orbax. A checkpoint is `(step, state, progress)`
in the folder `WORKDIR/checkpoints/STEP`; all processes of a run read it together.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from tokenrec.checkpoint.integrity import find_damage
from tokenrec.errors import InputError
from tokenrec.runtime import distributed
from tokenrec.state import TrainState

CHECKPOINTS_FOLDER = "checkpoints"
# Differences and damaged files in one message.
_MAX_LISTED = 8
# Stands for the shape of a leaf that is not read.
_NOT_READ = "..."


class CheckpointReader:
    """Open the checkpoints of a run for reading; a context manager.

    Args:
      workdir: folder of the run.
    """

    def __init__(self, workdir: Path) -> None:
        self._folder = Path(workdir).absolute() / CHECKPOINTS_FOLDER
        self._orbax = self._open()

    def _open(self) -> Any:
        return ocp.training.Checkpointer(self._folder)

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._orbax.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, in ascending order."""
        return checkpoint_steps(self._folder)

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluation, the earliest of equal ones; None without any.

        Raises:
          InputError: the metrics of a checkpoint cannot be read.
        """
        try:
            evaluated = [
                (metric_value(checkpoint.metrics), -checkpoint.step)
                for checkpoint in self._orbax.checkpoints
                if checkpoint.metrics
            ]
        except ValueError as error:
            raise InputError(
                f"'{self._folder}': the metrics of a checkpoint cannot be read "
                f"({error}); choose a step with --checkpoint, or resume the training, "
                "which sets damaged checkpoints aside"
            ) from error
        # Of equal values the smaller step, because its negative is larger.
        return -max(evaluated)[1] if evaluated else None

    def load_state(self, which: str, abstract: TrainState) -> tuple[int, TrainState]:
        """Load the state of a checkpoint.

        Args:
          which: "best", "latest" or a step; "best" is the latest without evaluations.
          abstract: shapes, types and shardings of the arrays. A leaf that is `...` is
            not read and returned as it is.

        Returns:
          The step and the state.

        Raises:
          InputError: the checkpoint does not exist, is damaged, or has other arrays.
        """
        with distributed.raise_on_all_processes():
            step = self._resolve_step(which)
        # A training run that saves meanwhile could give processes different answers.
        step = distributed.broadcast_from_first(step)
        damage = describe_damage(self._folder / str(step))
        if damage:
            others = [other for other in self.steps if other != step]
            raise InputError(
                f"checkpoint {step} in '{self._folder}' is damaged: {damage}; use "
                f"another one of {others}, or train again from the one before"
            )
        return step, self._load(step, abstract)

    def _resolve_step(self, which: str) -> int:
        steps = self.steps
        if not steps:
            raise InputError(
                f"'{self._folder}' holds no checkpoint; train first, or check --workdir"
            )
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = self.best_step
            return steps[-1] if best is None else best
        if which.isdecimal() and int(which) in steps:
            return int(which)
        raise InputError(
            f"checkpoint '{which}' does not exist; use best, latest, or one of {steps}"
        )

    def _load(self, step: int, abstract: TrainState) -> TrainState:
        with distributed.raise_on_all_processes():
            self._check_shapes(step, abstract)
        return self._orbax.load_checkpointables(step, {"state": abstract})["state"]

    def _check_shapes(self, step: int, abstract: TrainState) -> None:
        """Raise InputError if the checkpoint's arrays are not those of `abstract`."""
        # Orbax itself would fail later, with an error that names no array.
        metadata = self._orbax.checkpointables_metadata(step).metadata
        saved = _array_shapes(None if metadata is None else metadata.get("state"))
        wanted = _array_shapes(abstract)
        differing = [
            name
            for name in sorted(wanted.keys() | saved.keys())
            if wanted.get(name) not in (_NOT_READ, saved.get(name))
        ]
        if not differing:
            return
        lines = "".join(
            f"\n  {name}: {saved.get(name, 'nothing')} in the checkpoint, "
            f"{wanted.get(name, 'nothing')} in this model"
            for name in differing[:_MAX_LISTED]
        )
        if len(differing) > _MAX_LISTED:
            lines += f"\n  and {len(differing) - _MAX_LISTED} others"
        raise InputError(
            f"checkpoint {step} in '{self._folder}' has other arrays than this model; "
            "use the version of tokenrec that wrote it, or start a new --workdir:"
            f"{lines}"
        )


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, in ascending order."""
    return sorted(
        int(path.name)
        for path in folder.glob("*")
        if path.name.isdecimal() and path.is_dir()
    )


def describe_damage(folder: Path, max_bytes: float = math.inf) -> str:
    """Describe the damage of a checkpoint; all processes call it and share the reading.

    Args:
      folder: folder of the checkpoint.
      max_bytes: files that are larger are not checked.

    Returns:
      A text that is equal on all processes; empty if no damage is found.
    """
    damage = find_damage(folder, jax.process_index(), jax.process_count(), max_bytes)
    # All processes must decide alike, or they wait for each other.
    texts = distributed.gather_from_all("; ".join(damage[:_MAX_LISTED]))
    return "; ".join(text for text in texts if text)


def metric_value(metrics: Any) -> float:
    """The evaluation that is saved with a checkpoint; higher is better."""
    return metrics["value"]


def _array_shapes(tree: Any) -> dict[str, str]:
    """Type and shape of each array, by its path in the tree."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    shapes = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shapes[name] = _NOT_READ if leaf is ... else f"{leaf.dtype}{list(leaf.shape)}"
    return shapes
