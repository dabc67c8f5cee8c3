"""Save and restore the checkpoints of a training run.

A checkpoint is `(step, state, progress)`. The step is also the position in the training
data, so a run can resume with another number of processes. The config and the package
versions are stored with each checkpoint. All processes of a run save together.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from tokenrec.checkpoint.integrity import (
    QUARANTINE_PREFIX,
    quarantine,
    write_checksums,
)
from tokenrec.checkpoint.reader import (
    CHECKPOINTS_FOLDER,
    CheckpointReader,
    checkpoint_steps,
    describe_damage,
    metric_value,
)
from tokenrec.errors import InputError
from tokenrec.runtime import distributed
from tokenrec.runtime.versions import versions
from tokenrec.state import TrainState

# Name of a checkpoint that was saved before the evaluation of its step, while the
# checkpoint that replaces it is written.
_REPLACED_PREFIX = "unassessed-"
# Files of older checkpoints up to this size are verified at each start.
_SMALL_FILE_BYTES = 1 << 16
_MAX_REASON_CHARACTERS = 300


@dataclasses.dataclass(frozen=True)
class Progress:
    """State of the training loop besides weights and optimizer.

    Attributes:
      best: value of the best evaluation, higher is better; None before the first one.
      best_step: step of the best evaluation; -1 before the first one.
      waited: evaluations since the best one, for `train.patience`.
      skipped: steps whose update was skipped.
      assessed: False if a signal stopped the run before the evaluation that was due at
        this step; a resumed run then repeats it.
      step: updates made. A checkpoint does not repeat it: its folder is named by it.
    """

    # The names are keys of the JSON value beside a checkpoint.
    best: float | None = None
    best_step: int = -1
    waited: int = 0
    skipped: int = 0
    assessed: bool = True
    step: int = 0

    def after_evaluation(self, value: float | None) -> Progress:
        """Progress after an evaluation of this step; `value` is None if undefined."""
        if value is not None and (self.best is None or value > self.best):
            return dataclasses.replace(
                self, best=value, best_step=self.step, waited=0, assessed=True
            )
        return dataclasses.replace(self, waited=self.waited + 1, assessed=True)

    def to_json(self) -> dict[str, Any]:
        """JSON value that is kept beside a checkpoint."""
        values = dataclasses.asdict(self)
        del values["step"]
        return values


class Checkpointer(CheckpointReader):
    """Save and restore a run; a context manager that waits for the last save.

    The latest `keep` checkpoints stay, the best one, and those of every `keep_every`-th
    step. Opening verifies the checkpoints and sets damaged ones aside.

    Args:
      workdir: folder of the run.
      keep: number of latest checkpoints that stay.
      keep_every: checkpoints at multiples of this step stay; 0 for none.
      config: the run's config as a JSON value, stored with each checkpoint.

    Raises:
      InputError: there are checkpoints, and all of them are damaged.
    """

    def __init__(
        self, workdir: Path, *, keep: int, keep_every: int = 0, config: Any = None
    ) -> None:
        policies = ocp.training.preservation_policies
        preserved: list[Any] = [
            policies.LatestN(keep),
            policies.BestN(
                get_metric_fn=metric_value, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
        if keep_every:
            preserved.append(policies.EveryNSteps(keep_every))
        self._policy = policies.AnyPreservationPolicy(preserved)
        # Stored with each checkpoint, for use without the run's folder.
        self._origin = {"config": config, "versions": versions()}
        self._pending_save: _PendingSave | None = None
        # Orbax lists the folder when it opens: it must see the final names.
        folder = Path(workdir).absolute() / CHECKPOINTS_FOLDER
        _restore_replaced(folder)
        _quarantine_damaged(folder)
        super().__init__(workdir)

    def _open(self) -> Any:
        # Folders of interrupted saves are deleted.
        return ocp.training.Checkpointer(
            self._folder, preservation_policy=self._policy, cleanup_tmp_directories=True
        )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except InputError as save_error:
            if error is None:
                raise
            # The error that ended the loop is raised; this one must not replace it.
            print(f"tokenrec: {save_error}", file=sys.stderr)
        finally:
            try:
                self._orbax.close()
            except Exception as close_error:
                # After a failed save, Orbax raises its error again.
                if self._pending_save is None or self._pending_save.error is None:
                    raise close_error

    def save(
        self, step: int, state: TrainState, progress: Progress, value: float | None
    ) -> None:
        """Start to save a checkpoint in the background.

        The call returns when the state is copied from the devices. Saving a step again
        replaces its checkpoint if there is an evaluation now, and else does nothing.

        Args:
          step: number of updates made.
          state: the state after these updates.
          progress: progress at this step.
          value: evaluation of this step, higher is better; None without one.

        Raises:
          InputError: the save before this one failed.
        """
        self.wait()
        if step in self.steps:
            if value is None:
                return
            self._move_replaced(step)
        metrics = None if value is None else {"value": value}
        self._start_save(
            step,
            lambda: self._orbax.save_checkpointables_async(
                step,
                {"state": state},
                # Whatever the interval policy of Orbax says.
                force=True,
                metrics=metrics,
                custom_metadata={"progress": progress.to_json()} | self._origin,
            ),
        )

    def wait(self) -> None:
        """Wait until the checkpoint under way is complete on disk.

        Raises:
          InputError: it could not be written.
        """
        if self._pending_save is None:
            return
        self._pending_save.join()
        if self._pending_save.error is not None:
            self._raise_save_error(self._pending_save.step, self._pending_save.error)
        self._pending_save = None
        if distributed.is_first_process():
            # The replacement is complete: the earlier checkpoint of its step can go.
            for folder in self._folder.glob(_REPLACED_PREFIX + "*"):
                shutil.rmtree(folder)

    def restore(self, abstract: TrainState) -> tuple[int, TrainState, Progress] | None:
        """Restore the latest checkpoint.

        Args:
          abstract: shapes, types and shardings of the arrays.

        Returns:
          Step, state and progress; None without a checkpoint.

        Raises:
          InputError: the checkpoint has other arrays.
        """
        # The first process decides: another one may list the folder too early.
        step = distributed.broadcast_from_first(self.steps[-1] if self.steps else -1)
        if step < 0:
            return None
        state = self._load(step, abstract)
        metadata = self._orbax.checkpointables_metadata(step).custom_metadata
        return step, state, Progress(**metadata["progress"])

    def _start_save(self, step: int, save: Callable[[], Any]) -> None:
        try:
            response = save()
        # What Orbax and its storage library raise for a full or unwritable disk.
        except (OSError, ValueError, RuntimeError) as error:
            self._raise_save_error(step, error)
        self._pending_save = _PendingSave(step, response, self._folder / str(step))

    def _raise_save_error(self, step: int, error: BaseException) -> None:
        # Errors of Orbax continue with many lines of its internals.
        reason = str(error).strip().partition("\n")[0][:_MAX_REASON_CHARACTERS]
        complete = [known for known in self.steps if known != step]
        raise InputError(
            f"checkpoint {step} cannot be written to '{self._folder}': {reason}; free "
            "disk space or grant access, and rerun the command: checkpoints "
            f"{complete} are complete"
        ) from error

    def _move_replaced(self, step: int) -> None:
        """Keep the pre-evaluation checkpoint until its replacement is complete."""
        if distributed.is_first_process():
            replaced = self._folder / f"{_REPLACED_PREFIX}{step}"
            (self._folder / str(step)).rename(replaced)
        distributed.broadcast_from_first(0)
        # Orbax caches the steps, and refuses to save one that exists.
        self._orbax.reload()


class _PendingSave(threading.Thread):
    """Wait for a save, then write the checksums of its files."""

    def __init__(self, step: int, response: Any, folder: Path) -> None:
        super().__init__(name=f"save of checkpoint {step}", daemon=True)
        self.step = step
        self.error: BaseException | None = None
        self._response = response
        self._checkpoint = folder
        self.start()

    def run(self) -> None:
        try:
            # It returns when Orbax has given the folder its final name.
            self._response.result()
            write_checksums(self._checkpoint, jax.process_index(), jax.process_count())
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
            self.error = error


def _restore_replaced(folder: Path) -> None:
    """Undo the renaming of `_move_replaced` for replacements that are not complete."""
    if distributed.is_first_process():
        for path in folder.glob(_REPLACED_PREFIX + "*"):
            replacement = folder / path.name.removeprefix(_REPLACED_PREFIX)
            if replacement.exists():
                shutil.rmtree(path)
            else:
                path.rename(replacement)
    distributed.broadcast_from_first(0)


def _quarantine_damaged(folder: Path) -> None:
    """Verify the newest intact checkpoint fully, older ones by their small files.

    The small files of all checkpoints are read at the start; the large ones hold the
    weights, and only those of the newest checkpoint are needed.

    Raises:
      InputError: there are checkpoints, and all of them are damaged.
    """
    newest_intact = None
    damaged_count = 0
    for step in reversed(checkpoint_steps(folder)):
        max_bytes = math.inf if newest_intact is None else _SMALL_FILE_BYTES
        damage = describe_damage(folder / str(step), max_bytes)
        if not damage:
            newest_intact = step if newest_intact is None else newest_intact
            continue
        damaged_count += 1
        if distributed.is_first_process():
            target = quarantine(folder / str(step))
            print(
                f"tokenrec: checkpoint {step} is damaged: {damage}; set aside as "
                f"'{target}'",
                file=sys.stderr,
            )
    # No process may list the folder before all damaged checkpoints are renamed.
    distributed.broadcast_from_first(0)
    if damaged_count and newest_intact is None:
        raise InputError(
            f"'{folder}' holds no intact checkpoint: {damaged_count} damaged ones were "
            f"set aside as {QUARANTINE_PREFIX}STEP; restore them from a copy, or start "
            "a new --workdir"
        )
