"""Metric writers: the interface, `metrics.jsonl` and TensorBoard.

A run writes its metrics through `RunLog` (`run_log.py`), which passes them to every
writer. The writers of `wandb_writer.py` and `mlflow_writer.py` and the progress display
of `progress.py` have the same interface.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

from tensorboardX import SummaryWriter

from tokenrec.errors import InputError, StorageError
from tokenrec.runtime.files import atomic_replace
from tokenrec.runtime.retry import is_transient, retry, storage_error

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricWriter(Protocol):
    """Interface of all metric writers. One process of a run writes."""

    def write(
        self,
        step: int,
        values: Mapping[str, SupportsFloat | None],
        prefix: str = "train",
    ) -> None:
        """Write the metrics of a step.

        Args:
          step: number of updates made so far.
          values: metric name -> number or zero-dimensional array; None if undefined.
          prefix: "train", the name of the evaluated split, or another group of metrics.
        """

    def close(self) -> None:
        """Flush and close; further calls do nothing."""


class JsonlWriter:
    """Write one JSON line per call to `WORKDIR/metrics.jsonl`.

    A line is `{"step", "time", "PREFIX/NAME": value, ...}`; a value that is undefined,
    NaN or infinite is null. A run that starts at `start_step`, restored from a
    checkpoint, first drops the lines after that step, which the interrupted run wrote;
    a run that starts at 0 drops all lines. A file that is deleted or replaced while the
    run writes it is made again, or continued.

    Args:
      workdir: folder of the run; it is created if missing.
      start_step: step at which the run starts.

    Raises:
      InputError: `metrics.jsonl` cannot be read or written, now or in a later call.
      StorageError: the storage is at fault, again and again.
    """

    def __init__(self, workdir: Path, *, start_step: int = 0) -> None:
        self._path = Path(workdir) / METRICS_FILE
        self._start_step = start_step
        with raise_write_errors(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _keep_records(self._path, lambda record: 0 < start_step >= record["step"])
            # An evaluation at the step of the checkpoint was logged before the stop and
            # may run again after the restart: its new line replaces the old one.
            self._may_repeat = [
                record
                for record in read_log(self._path)
                if record["step"] == start_step
            ]
            self._file = self._open()
        # Some network disks give a file another number each time.
        self._numbers_are_stable = True

    def write(
        self,
        step: int,
        values: Mapping[str, SupportsFloat | None],
        prefix: str = "train",
    ) -> None:
        """Append a line and flush it, so that it survives a kill of the process.

        Args:
          step: number of updates made so far.
          values: metric name -> number; None if undefined.
          prefix: group of the metrics.
        """
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for name, value in finite_values(values).items():
            line[f"{prefix}/{name}"] = value
        with raise_write_errors(self._path.parent):
            if step == self._start_step and any(
                _has_prefix(record, prefix) for record in self._may_repeat
            ):
                self._drop_repeated(prefix)
            self._append((json.dumps(line, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        """Flush and close the file; further calls do nothing."""
        with raise_write_errors(self._path.parent):
            self._file.close()

    def _drop_repeated(self, prefix: str) -> None:
        """Drop the lines of `start_step` under `prefix`."""
        self._may_repeat = [
            record for record in self._may_repeat if not _has_prefix(record, prefix)
        ]
        # The file is replaced, so the open handle would append to the deleted one.
        self._file.close()
        _keep_records(
            self._path,
            lambda record: (
                record["step"] != self._start_step or not _has_prefix(record, prefix)
            ),
        )
        self._file = self._open()

    def _open(self) -> io.FileIO:
        # Without a buffer a line reaches the operating system at once: a kill of the
        # process loses nothing. A power failure may, but then the run resumes from a
        # checkpoint and writes the lines again.
        return self._path.open("ab", buffering=0)

    def _append(self, line: bytes) -> None:
        rest = line

        def append() -> None:
            nonlocal rest
            self._reopen_if_replaced()
            while rest:
                # A retry goes on where the attempt before it failed.
                rest = rest[self._file.write(rest) :]

        retry(append, self._path)

    def _reopen_if_replaced(self) -> None:
        """Open the path again if the open file is not, or no longer, what it names."""
        if self._is_current():
            return
        is_missing = not self._path.exists()
        self._file.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()
        self._numbers_are_stable = self._is_current()
        if is_missing:
            print(
                f"tokenrec: '{self._path}' was deleted or moved while the run wrote it; "
                "it is made again, without its earlier lines",
                file=sys.stderr,
            )

    def _is_current(self) -> bool:
        # A closed file is an error of the caller, and not of the disk.
        number = self._file.fileno()
        try:
            named = self._path.stat()
            return not self._numbers_are_stable or os.path.samestat(
                named, os.fstat(number)
            )
        except FileNotFoundError:
            return False
        except OSError as error:
            # The server has forgotten the open file; what the path names may be well.
            if error.errno != errno.ESTALE:
                raise
            return False


class TensorBoardWriter:
    """Write TensorBoard scalars named `PREFIX/NAME` to `WORKDIR/tensorboard`.

    Values that are undefined, NaN or infinite are left out. TensorBoard hides what an
    interrupted run wrote after `start_step`. A later error of the disk ends the writing
    and not the run, which has its metrics in `metrics.jsonl`: a warning says so.

    Args:
      workdir: folder of the run.
      start_step: step at which the run starts.
      config: the run's config, shown under "Text"; None writes no text.

    Raises:
      InputError: the folder cannot be written.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start_step: int = 0,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = Path(workdir)
        with raise_write_errors(self._folder):
            self._writer = SummaryWriter(
                str(self._folder / TENSORBOARD_FOLDER),
                # 0 hides everything that an earlier run wrote here.
                purge_step=start_step + 1 if start_step else 0,
            )
            self._events = _EventFile.wrap(self._writer)
            if config is not None:
                # Indented lines are a code block in Markdown, which "Text" renders.
                text = json.dumps(config, indent=1).replace("\n", "\n    ")
                self._writer.add_text("config", f"    {text}", start_step)

    def write(
        self,
        step: int,
        values: Mapping[str, SupportsFloat | None],
        prefix: str = "train",
    ) -> None:
        """Write a scalar for each finite value.

        Args:
          step: number of updates made so far.
          values: metric name -> number; None if undefined.
          prefix: group of the metrics.
        """
        for name, value in finite_values(values).items():
            # TensorBoard has no null, and SummaryWriter prints a warning for NaN.
            if value is not None:
                self._writer.add_scalar(f"{prefix}/{name}", value, step)
        self._events.warn_if_stopped()

    def write_result(
        self, config: Mapping[str, Any], result: Mapping[str, SupportsFloat | None]
    ) -> None:
        """Write the result of the run beside its config, for the tab "HPARAMS".

        Args:
          config: values of the config by dotted name; TensorBoard takes numbers,
            booleans and texts, so others are written as text.
          result: metrics of the best evaluation by name.
        """
        hparams = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in config.items()
        }
        metrics = {
            f"result/{name}": value
            for name, value in finite_values(result).items()
            if value is not None
        }
        try:
            # The name is that of a subfolder; by default it is the time, and a resumed
            # run would leave one for each start.
            self._writer.add_hparams(hparams, metrics, name="result")
        except OSError as error:
            self._events.stop(error)
        self._events.warn_if_stopped()

    def close(self) -> None:
        """Flush and close the event file; further calls do nothing."""
        self._writer.close()
        self._events.warn_if_stopped()


class _EventFile:
    """The event file of a SummaryWriter, which drops what cannot be written.

    SummaryWriter writes it in a thread. An error there would end the thread, and the
    training would then wait forever for room in its queue.
    """

    def __init__(self, events: Any) -> None:
        self._events = events
        # Text, as an error would keep the arrays of its callers alive.
        self._error: str | None = None
        self._has_warned = False

    @classmethod
    def wrap(cls, writer: SummaryWriter) -> _EventFile:
        """Put itself between a SummaryWriter, whose queue is empty, and its file."""
        queue = writer.file_writer.event_writer
        events = cls(queue._ev_writer)
        queue._ev_writer = queue._worker._record_writer = events
        return events

    def stop(self, error: OSError) -> None:
        """Write nothing from now on."""
        self._error = self._error or str(error)

    def warn_if_stopped(self) -> None:
        """Say once that an error ended the writing."""
        if self._error is not None and not self._has_warned:
            self._has_warned = True
            print(
                f"tokenrec: TensorBoard gets no more metrics of this run: {self._error}; "
                f"all metrics are in {METRICS_FILE}",
                file=sys.stderr,
            )

    def write_event(self, event: Any) -> None:
        self._attempt(lambda: self._events.write_event(event))

    def flush(self) -> None:
        self._attempt(self._events.flush)

    def close(self) -> None:
        self._attempt(self._events.close)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._error is None:
            try:
                action()
            except OSError as error:
                self.stop(error)


def finite_values(
    values: Mapping[str, SupportsFloat | None],
) -> dict[str, float | None]:
    """Convert values to floats; None for those that are undefined, NaN or infinite."""
    finite: dict[str, float | None] = {}
    for name, value in values.items():
        number = math.nan if value is None else float(value)
        finite[name] = number if math.isfinite(number) else None
    return finite


@contextlib.contextmanager
def raise_write_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError, which does not name the folder, into an error that does.

    Raises:
      InputError: the user has to change something, such as a full disk.
      StorageError: the storage is at fault, and the same command may succeed later.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if is_transient(error):
            raise storage_error(error, folder) from error
        raise InputError(
            f"the log in '{folder}' cannot be written: {error.strerror or error}; free "
            "disk space or grant access, and rerun the same command to resume from the "
            "last checkpoint"
        ) from error


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a `metrics.jsonl`; none if the file does not exist.

    A last line without a line break is skipped: the process was killed while it wrote
    that line, or is writing it now.

    Raises:
      InputError: another line is not a JSON object with a step.
    """
    if not path.exists():
        return
    for _, record in _read_lines(path):
        yield record


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line with its record, one at a time: logs of long runs are large."""
    # A torn last line can end inside a character; JSON then refuses it.
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                # A foreign file must not be cut back as if it were our log.
                if not isinstance(record, dict) or not isinstance(
                    record.get("step"), int
                ):
                    raise ValueError("no step")
            except ValueError as error:
                # Only the last line can lack its line break.
                if not line.endswith("\n"):
                    return
                raise InputError(
                    f"{path}: line {number} is not a JSON object with a step ({error}); "
                    "move the file away"
                ) from error
            yield line, record


def _has_prefix(record: Mapping[str, Any], prefix: str) -> bool:
    return any(name.startswith(prefix + "/") for name in record)


def _keep_records(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Rewrite the file with the records for which `keep` is true."""
    # 1. The usual case, in which nothing is written: the file ends at the checkpoint.
    if not path.exists():
        return
    kept_bytes = sum(
        len(line.encode())
        for line, record in _read_lines(path)
        if line.endswith("\n") and keep(record)
    )
    if kept_bytes == path.stat().st_size:
        return
    # 2. Another file, which replaces this one when it is complete.
    with atomic_replace(path) as partial, partial.open("w", encoding="utf-8") as file:
        for line, record in _read_lines(path):
            if keep(record):
                file.write(line.removesuffix("\n") + "\n")
