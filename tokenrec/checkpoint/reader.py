"""Read the checkpoints of a run.

This package is the only one that uses Orbax. A checkpoint is `(step, state, progress)`
in the folder `WORKDIR/checkpoints/STEP`; all processes of a run read it together.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from tokenrec.checkpoint.integrity import (
    PROGRESS_FILE,
    find_damage,
    is_verified,
    read_signed_json,
)
from tokenrec.checkpoint.object_storage import committed_steps, orbax_context
from tokenrec.checkpoint.path_alias import orbax_path
from tokenrec.checkpoint.progress import Progress
from tokenrec.checkpoint.table_layout import to_model_layout, with_saved_layout
from tokenrec.errors import InputError, StorageError
from tokenrec.runtime import distributed
from tokenrec.runtime.paths import absolute, is_remote, list_names
from tokenrec.runtime.retry import is_transient, retry, storage_error
from tokenrec.state import TrainState

CHECKPOINTS_FOLDER = "checkpoints"
# Differences and damaged files in one message.
_MAX_LISTED = 8
_MAX_REASON_CHARACTERS = 300
# Stands for the shape of a leaf that is not read.
_NOT_READ = "..."


class CheckpointReader:
    """Open the checkpoints of a run for reading; a context manager.

    Args:
      workdir: folder of the run.
    """

    def __init__(self, workdir: Path) -> None:
        self._folder = absolute(workdir) / CHECKPOINTS_FOLDER
        self._stack = contextlib.ExitStack()
        # What Orbax is given: another name of the same folder if it needs one.
        self._orbax_folder = self._stack.enter_context(orbax_path(self._folder))

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, in ascending order."""
        return checkpoint_steps(self._folder)

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluation, the earliest of equal ones; None without any.

        If its checkpoint is gone, it is the step that was the best before.

        Raises:
          InputError: the progress of a checkpoint cannot be read.
        """
        steps = self.steps
        if not steps:
            return None
        best = self.progress(steps[-1]).best_step
        if best < 0 or best in steps:
            return best if best >= 0 else None
        # The best value only improves, so the latest checkpoint that was the best when
        # it was saved is the best one of those that are left.
        earlier = [step for step in reversed(steps) if step < best]
        for step in earlier:
            if self.progress(step).best_step == step:
                print(
                    f"tokenrec: '{self._folder}' has no checkpoint {best}, which had "
                    f"the best evaluation; {step} was the best before",
                    file=sys.stderr,
                )
                return step
        return None

    def progress(self, step: int) -> Progress:
        """The progress that was saved with a checkpoint.

        Raises:
          InputError: it cannot be read.
        """
        later = self._folder / str(step) / PROGRESS_FILE
        with self._name_damage(step):
            # An evaluation after the save has the last word.
            if retry(later.exists, later):
                return Progress.from_json(read_signed_json(later), step)
            metadata = self._metadata(step).custom_metadata
            return Progress.from_json(metadata["progress"], step)

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
          StorageError: it cannot be read now.
        """
        with distributed.raise_on_all_processes():
            step = self._resolve_step(which)
        # A training run that saves meanwhile could give processes different answers.
        step = distributed.broadcast_from_first(step)
        folder = self._folder / str(step)
        damage = describe_damage(folder)
        if damage:
            others = [other for other in self.steps if other != step]
            raise InputError(
                f"checkpoint {step} in '{self._folder}' is damaged: {damage}; use "
                f"--checkpoint with one of {others}, or resume the training, which sets "
                "damaged checkpoints aside"
            )
        if distributed.is_first_process() and not is_verified(folder):
            print(
                f"tokenrec: checkpoint {step} in '{self._folder}' has no checksums yet, "
                "so that damage to its weights would not be noticed",
                file=sys.stderr,
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
        self._check_arrays(step, abstract)
        return self._load_arrays(step, abstract)

    def _load_arrays(self, step: int, abstract: TrainState) -> TrainState:
        """Load a state whose arrays are those of `abstract`.

        Raises:
          InputError: on all processes, if it cannot be read.
          StorageError: on all processes, if it cannot be read now.
        """
        path = self._orbax_folder / str(step)
        with (
            distributed.raise_on_all_processes(),
            self._name_damage(step),
            orbax_context(path),
        ):
            # Runs of earlier versions hold tables in another layout.
            saved = with_saved_layout(abstract, self._saved_arrays(step))
            loaded = retry(
                lambda: ocp.load_checkpointables(path, {"state": saved}),
                self._folder / str(step),
            )
        return to_model_layout(loaded["state"], abstract)

    def _metadata(self, step: int) -> Any:
        path = self._orbax_folder / str(step)
        with orbax_context(path):
            return retry(
                lambda: ocp.checkpointables_metadata(path), self._folder / str(step)
            )

    def _saved_arrays(self, step: int) -> Any:
        """Shapes and types of the arrays of a checkpoint, a tree; None without any."""
        metadata = self._metadata(step).metadata
        return None if metadata is None else metadata.get("state")

    @contextlib.contextmanager
    def _name_damage(self, step: int) -> Iterator[None]:
        """Turn what Orbax raises for an unreadable checkpoint into an InputError."""
        try:
            yield
        except (InputError, StorageError):
            raise
        # Orbax and TensorStore raise nearly anything where a file is damaged.
        except Exception as error:
            if is_transient(error):
                raise storage_error(error, self._folder / str(step)) from error
            raise InputError(
                f"checkpoint {step} in '{self._folder}' cannot be read: "
                f"{first_line(error)}; choose another one of {self.steps} with "
                "--checkpoint, or resume the training, which sets damaged checkpoints "
                "aside"
            ) from error

    def _check_arrays(self, step: int, abstract: TrainState) -> None:
        """Check that the checkpoint's arrays are those of `abstract`.

        Raises:
          InputError: on all processes, if they are not, or cannot be read.
        """
        with distributed.raise_on_all_processes(), self._name_damage(step):
            self._compare_arrays(step, abstract)

    def _compare_arrays(self, step: int, abstract: TrainState) -> None:
        # Orbax itself would fail later, with an error that names no array.
        arrays = self._saved_arrays(step)
        saved = array_shapes(arrays)
        wanted = array_shapes(with_saved_layout(abstract, arrays))
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
    if is_remote(folder):
        return committed_steps(folder)
    named = [folder / name for name in list_names(folder) if name.isdecimal()]
    return sorted(int(path.name) for path in named if retry(path.is_dir, path))


def describe_damage(folder: Path) -> str:
    """Describe the damage of a checkpoint; all processes call it and share the reading.

    Args:
      folder: folder of the checkpoint.

    Returns:
      A text that is equal on all processes; empty if no damage is found.

    Raises:
      StorageError: on all processes, if one of them cannot read a file now.
      InputError: on all processes, if one of them may not read a file.
    """
    with distributed.raise_on_all_processes():
        try:
            damage = find_damage(folder, jax.process_index(), jax.process_count())
        except PermissionError as error:
            raise InputError(f"{error}; grant access to the checkpoint") from error
    # All processes must decide alike, or they wait for each other.
    texts = distributed.gather_from_all("; ".join(damage[:_MAX_LISTED]))
    # All of them find the same damage in the checksums.
    return "; ".join(dict.fromkeys(text for text in texts if text))


def first_line(error: BaseException) -> str:
    """First line of an error; those of Orbax continue with many lines of internals."""
    text = str(error).strip() or type(error).__name__
    return text.partition("\n")[0][:_MAX_REASON_CHARACTERS]


def array_shapes(tree: Any) -> dict[str, str]:
    """Type and shape of each array, by its path in the tree."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    shapes = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shapes[name] = _NOT_READ if leaf is ... else f"{leaf.dtype}{list(leaf.shape)}"
    return shapes
