"""Save and restore the checkpoints of a training run.

A checkpoint is `(step, state, progress)`. The step is also the position in the training
data, so a run can resume with another number of processes. The config, the package
versions and the devices are stored with each checkpoint. All processes of a run save together.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from tokenrec.checkpoint.integrity import (
    PROGRESS_FILE,
    QUARANTINE_PREFIX,
    is_verified,
    quarantine,
    remove_checksums,
    write_checksums,
    write_signed_json,
)
from tokenrec.checkpoint.object_storage import (
    orbax_context,
    remove_uncommitted,
    uncommit,
)
from tokenrec.checkpoint.pending_save import PendingSave
from tokenrec.checkpoint.progress import Progress
from tokenrec.checkpoint.reader import (
    CHECKPOINTS_FOLDER,
    CheckpointReader,
    array_shapes,
    checkpoint_steps,
    describe_damage,
    first_line,
)
from tokenrec.checkpoint.retention import steps_to_delete
from tokenrec.errors import InputError, StorageError
from tokenrec.runtime import distributed
from tokenrec.runtime.limits import open_files_reached
from tokenrec.runtime.paths import (
    absolute,
    is_remote,
    list_names,
    make_folder,
    remove_folder,
)
from tokenrec.runtime.retry import is_transient, retry
from tokenrec.runtime.versions import versions
from tokenrec.state import TrainState

# Of earlier versions: a checkpoint from before the evaluation of its step, while the one
# that replaces it was written.
_REPLACED_PREFIX = "unassessed-"
# Folders of interrupted saves, and of checkpoints that are being deleted.
_DELETED_PREFIX = ".deleted-"
_PARTIAL_INFIX = ".orbax-checkpoint-tmp"
# Saves in a row that a fault of the storage may prevent before the run ends.
_MAX_FAILED_SAVES = 3
# Seconds before a save that failed is made once more, times its failures.
_RETRY_SECONDS = 2.0


class Checkpointer(CheckpointReader):
    """Save and restore a run; a context manager that waits for the last save.

    The latest `keep` checkpoints stay, the best one, and those of every `keep_every`-th
    step. Opening verifies the latest checkpoint and sets damaged ones aside.

    Args:
      workdir: folder of the run.
      keep: number of latest checkpoints that stay.
      keep_every: checkpoints at multiples of this step stay; 0 for none.
      config: the run's config as a JSON value, stored with each checkpoint.
      devices: the devices of this start, likewise.

    Raises:
      InputError: there are checkpoints, and all of them are damaged.
      StorageError: the latest checkpoint cannot be read now.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep: int,
        keep_every: int = 0,
        config: Any = None,
        devices: Any = None,
    ) -> None:
        self._keep = keep
        self._keep_every = keep_every
        # Stored with each checkpoint, for use without the run's folder.
        self._origin = {"config": config, "versions": versions(), "devices": devices}
        self._pending_save: PendingSave | None = None
        self._failed_saves = 0
        folder = absolute(workdir) / CHECKPOINTS_FOLDER
        with distributed.raise_on_all_processes():
            if distributed.is_first_process():
                retry(lambda: _prepare_folder(folder), folder)
        _quarantine_damaged(folder)
        super().__init__(workdir)

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
        except (InputError, StorageError) as save_error:
            if error is None:
                raise
            # The error that ended the loop is raised; this one must not replace it.
            print(f"tokenrec: {save_error}", file=sys.stderr)
        finally:
            super().__exit__(kind, error, traceback)

    @property
    def save_failed(self) -> bool:
        """Whether a fault of the storage prevented the last save; it is to be repeated.

        Always False in a run of several processes, which must all save alike.
        """
        pending = self._pending_save
        return (
            jax.process_count() == 1
            and pending is not None
            and pending.error is not None
            and is_transient(pending.error)
        )

    def save(self, step: int, state: TrainState, progress: Progress) -> None:
        """Start to save a checkpoint in the background.

        The call returns when the state is copied from the devices. Saving a step again,
        after an evaluation, replaces the progress of its checkpoint only.

        Args:
          step: number of updates made.
          state: the state after these updates.
          progress: progress at this step.

        Raises:
          InputError: the save before this one failed.
          StorageError: saves have failed again and again.
        """
        self._wait_or_count()
        folder = self._folder / str(step)
        shapes = array_shapes(state)
        response: Any = None
        if step in self.steps:
            saved = self.progress(step)
            if distributed.is_first_process() and saved.to_json() != progress.to_json():
                write_signed_json(folder / PROGRESS_FILE, progress.to_json())
            if not self._failed_saves:
                return
            # A fault of the storage has left it without checksums: write them now.
        else:
            path = self._orbax_folder / str(step)
            try:
                with orbax_context(path):
                    response = ocp.save_checkpointables_async(
                        path,
                        {"state": state},
                        custom_metadata={"progress": progress.to_json()} | self._origin,
                    )
            except Exception as error:  # noqa: BLE001 - as if it had come later
                response = error
        self._pending_save = PendingSave(
            step, response, lambda: self._complete(step, shapes, progress.best_step)
        )

    def wait(self) -> None:
        """Wait until the checkpoint under way is complete on disk.

        Raises:
          InputError: it could not be written.
          StorageError: it could not be written because the storage is at fault.
        """
        pending = self._pending_save
        if pending is None:
            return
        pending.join()
        self._pending_save = None
        if pending.error is not None:
            self._raise_save_error(pending.step, pending.error)
        self._failed_saves = 0

    def finish(self, step: int, state: TrainState, progress: Progress) -> None:
        """Wait for the last save; make it again if the storage was at fault.

        Args:
          step: the last step.
          state: the state after it.
          progress: progress at this step.

        Raises:
          InputError: a checkpoint could not be written.
          StorageError: it could not be written, even when tried again.
        """
        self._wait_or_count()
        while self._failed_saves:
            self.save(step, state, progress)
            self._wait_or_count()

    def restore(self, abstract: TrainState) -> tuple[int, TrainState, Progress] | None:
        """Restore the latest checkpoint.

        A checkpoint without checksums gets them here if it can be read, and is set
        aside otherwise.

        Args:
          abstract: shapes, types and shardings of the arrays.

        Returns:
          Step, state and progress; None without a checkpoint.

        Raises:
          InputError: the checkpoint has other arrays, or all of them are damaged.
          StorageError: it cannot be read now.
        """
        # The first process decides: another one may list the folder too early.
        step = distributed.broadcast_from_first(self.steps[-1] if self.steps else -1)
        if step < 0:
            return None
        folder = self._folder / str(step)
        # All processes must see the same before one of them writes.
        verified = distributed.broadcast_from_first(is_verified(folder))
        self._check_arrays(step, abstract)
        try:
            state = self._load_arrays(step, abstract)
        except InputError as error:
            # What could not be opened for want of file numbers is not damaged.
            if verified or open_files_reached(error):
                raise
            _set_aside(folder, str(error))
            _quarantine_damaged(self._folder)
            return self.restore(abstract)
        if not verified:
            self._write_missing_checksums(folder)
        return step, state, self.progress(step)

    def _complete(self, step: int, shapes: dict[str, str], best_step: int) -> None:
        """Verify what Orbax has written; then delete what is not needed any more.

        Runs in the background, when Orbax has given the folder its final name.
        """
        folder = self._folder / str(step)
        if distributed.is_first_process():
            # Storage that loses files without an error must not be noticed at a restart.
            self._compare_with_saved(step, shapes)
        write_checksums(folder, jax.process_index(), jax.process_count())
        if distributed.is_first_process():
            self._wait_for_other_checksums(folder)
            for old in steps_to_delete(
                self.steps,
                keep=self._keep,
                keep_every=self._keep_every,
                best_step=best_step,
            ):
                _delete(self._folder / str(old))

    def _compare_with_saved(self, step: int, shapes: dict[str, str]) -> None:
        """Raise InputError if the arrays on disk are not those that were saved."""
        try:
            written = array_shapes((self._metadata(step).metadata or {}).get("state"))
        except StorageError:
            raise
        # Orbax raises nearly anything where files are missing.
        except Exception as error:
            raise InputError(
                f"its arrays cannot be read back: {first_line(error)}"
            ) from error
        if written != shapes:
            missing = len(shapes.keys() - written.keys())
            raise InputError(
                f"its arrays are not those that were saved: {missing} of {len(shapes)} "
                "are missing"
            )

    def _wait_for_other_checksums(self, folder: Path) -> None:
        """Wait until all processes have verified their share of a checkpoint.

        Without an end of its own: the watchdog ends a run whose next save waits here.
        """
        while not is_verified(folder):
            time.sleep(0.05)

    def _write_missing_checksums(self, folder: Path) -> None:
        """Write the checksums of a checkpoint whose process ended before it could."""
        with distributed.raise_on_all_processes():
            if distributed.is_first_process():
                print(
                    f"tokenrec: checkpoint {folder.name} had no checksums, because its "
                    "process ended before it wrote them; its arrays are complete, and "
                    "the checksums are written now",
                    file=sys.stderr,
                )
                retry(lambda: remove_checksums(folder), folder)
        with distributed.raise_on_all_processes():
            write_checksums(folder, jax.process_index(), jax.process_count())

    def _wait_or_count(self) -> None:
        """Wait for the save under way; a fault of the storage is counted and said."""
        pending = self._pending_save
        if pending is not None:
            pending.join()
        if pending is None or pending.error is None or not self.save_failed:
            self.wait()
            return
        self._pending_save = None
        self._failed_saves += 1
        if self._failed_saves >= _MAX_FAILED_SAVES:
            self._raise_save_error(pending.step, pending.error)
        delay = _RETRY_SECONDS * self._failed_saves
        print(
            f"tokenrec: checkpoint {pending.step} could not be written to "
            f"'{self._folder}': {first_line(pending.error)}; saving again in {delay:g} s",
            file=sys.stderr,
        )
        time.sleep(delay)
        # What is left of it is in the way of the next attempt.
        _remove_partial(self._folder)

    def _raise_save_error(self, step: int, error: BaseException) -> None:
        # What Orbax and its storage library raise for a full or unwritable disk; others
        # are faults of the program, which keep their traceback.
        transient = is_transient(error)
        if not transient and not isinstance(error, OSError | ValueError | RuntimeError):
            raise error
        complete = [known for known in self.steps if known != step]
        remedy = (
            "the storage is at fault: rerun the command when it is back"
            if transient
            else "free disk space, grant access or raise the limit, and rerun the command"
        )
        kind = StorageError if transient else InputError
        raise kind(
            f"checkpoint {step} cannot be written to '{self._folder}': "
            f"{first_line(error)}; {remedy}: checkpoints {complete} are complete"
        ) from error


def _prepare_folder(folder: Path) -> None:
    """Make the folder of the checkpoints, and remove what an interrupted run left."""
    make_folder(folder)
    _remove_partial(folder)
    if is_remote(folder):
        return
    for name in list_names(folder):
        if not name.startswith(_REPLACED_PREFIX):
            continue
        path = folder / name
        original = folder / name.removeprefix(_REPLACED_PREFIX)
        if original.exists():
            shutil.rmtree(path)
        else:
            path.rename(original)


def _remove_partial(folder: Path) -> None:
    """Delete the folders of interrupted saves and deletions."""
    if is_remote(folder):
        remove_uncommitted(folder)
        return
    for name in list_names(folder):
        if _PARTIAL_INFIX in name or name.startswith(_DELETED_PREFIX):
            shutil.rmtree(folder / name, ignore_errors=True)


def _delete(folder: Path) -> None:
    """Delete a checkpoint; a kill in between leaves no part that is taken for one."""
    if is_remote(folder):
        retry(lambda: uncommit(folder), folder)
        retry(lambda: remove_folder(folder), folder)
        return
    doomed = folder.with_name(f"{_DELETED_PREFIX}{folder.name}")
    retry(lambda: folder.rename(doomed), folder)
    shutil.rmtree(doomed, ignore_errors=True)


def _quarantine_damaged(folder: Path) -> None:
    """Verify checkpoints, the newest first, until one is intact; rename damaged ones.

    Older ones are verified when they are used: a start must not read all of them.

    Raises:
      InputError: there are checkpoints, and all of them are damaged.
      StorageError: a checkpoint cannot be read now.
    """
    damaged_count = 0
    while True:
        steps = checkpoint_steps(folder)
        step = distributed.broadcast_from_first(steps[-1] if steps else -1)
        if step < 0:
            break
        damage = describe_damage(folder / str(step))
        if not damage:
            return
        damaged_count += 1
        _set_aside(folder / str(step), damage)
    if damaged_count:
        raise InputError(
            f"'{folder}' holds no intact checkpoint: {damaged_count} damaged ones were "
            f"set aside as {QUARANTINE_PREFIX}STEP; restore them from a copy, or start "
            "a new --workdir"
        )


def _set_aside(folder: Path, reason: str) -> None:
    """Rename a damaged checkpoint and say it; all processes call it."""
    if distributed.is_first_process():
        target = retry(lambda: quarantine(folder), folder)
        print(
            f"tokenrec: checkpoint {folder.name} is damaged: {reason}; set aside as "
            f"'{target}'",
            file=sys.stderr,
        )
    # No process may list the folder before the checkpoint is renamed.
    distributed.broadcast_from_first(0)
