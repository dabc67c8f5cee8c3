"""The log of a run: pass metrics to every metric writer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

from tokenrec.runtime.log_mirror import LogMirror
from tokenrec.runtime.metric_writer import (
    JsonlWriter,
    MetricWriter,
    TensorBoardWriter,
    finite_values,
)
from tokenrec.runtime.trackers import OutcomeWriter


class RunLog:
    """Write metrics to several writers; a context manager that closes them.

    Args:
      writers: all of them get the same metrics, in this order. A run whose process is
        not the first one has no writers, and `write` does nothing.
      mirror: uploads what they write to a run's folder in an object store; None does
        not.
    """

    def __init__(
        self, writers: Sequence[MetricWriter] = (), mirror: LogMirror | None = None
    ) -> None:
        self._writers = tuple(writers)
        self._mirror = mirror

    @property
    def folder(self) -> Path | None:
        """Folder that the writers write to; None without any."""
        return None if self._mirror is None else self._mirror.folder

    def sync(self) -> None:
        """Upload what is written so far, before a checkpoint of this step.

        It does nothing for a run's folder on a disk, which has it already.

        Raises:
          StorageError: it cannot be uploaded.
        """
        if self._mirror is not None:
            self._mirror.sync()

    def write(
        self,
        step: int,
        values: Mapping[str, SupportsFloat | None],
        prefix: str = "train",
    ) -> None:
        """Write the metrics of a step to all writers.

        Args:
          step: number of updates made so far.
          values: metric name -> number; None if undefined.
          prefix: group of the metrics.
        """
        if not self._writers:
            return
        # Converted once: a value may be an array that is fetched from a device.
        numbers = finite_values(values)
        for writer in self._writers:
            writer.write(step, numbers, prefix)

    def write_result(
        self, config: Mapping[str, Any], result: Mapping[str, SupportsFloat | None]
    ) -> None:
        """Write the result of the run with the writers that have a place for it."""
        for writer in self._writers:
            if isinstance(writer, TensorBoardWriter):
                writer.write_result(config, result)

    def close(self) -> None:
        """Close all writers, the last one first, even if one of them fails."""
        # The stack calls all of them and raises the last error.
        with contextlib.ExitStack() as stack:
            if self._mirror is not None:
                stack.callback(self._mirror.close)
            for writer in self._writers:
                stack.callback(writer.close)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for writer in self._writers:
            if error is not None and isinstance(writer, OutcomeWriter):
                writer.end_with(error)
        self.close()


def open_run_log(
    workdir: Path,
    *,
    start_step: int = 0,
    config: Mapping[str, Any] | None = None,
    trackers: Sequence[str] = (),
    more: Sequence[MetricWriter] = (),
) -> RunLog:
    """Open the writers of a run: `metrics.jsonl`, TensorBoard and experiment trackers.

    Args:
      workdir: folder of the run.
      start_step: step at which the run starts; later metrics of an interrupted run are
        dropped or hidden.
      config: the run's config, for TensorBoard and the trackers.
      trackers: `train.trackers`, names of `TRACKERS`.
      more: further writers, such as the progress display; the log closes them.

    Raises:
      InputError: the folder cannot be written, or the package of a tracker is missing.
    """
    with contextlib.ExitStack() as opened:
        writers: list[MetricWriter] = []

        def add(writer: MetricWriter) -> None:
            writers.append(writer)
            opened.callback(writer.close)

        # If a later writer cannot be opened, the earlier ones are closed.
        for writer in more:
            opened.callback(writer.close)
        mirror = LogMirror(workdir)
        opened.callback(mirror.close)
        # First: if another writer fails later, the line is in metrics.jsonl already.
        folder = mirror.folder
        add(JsonlWriter(folder, start_step=start_step))
        add(TensorBoardWriter(folder, start_step=start_step, config=config))
        for name in trackers:
            add(_open_tracker(name, folder, config or {}))
        # All are open: the log closes them from now on.
        opened.pop_all()
    return RunLog([*writers, *more], mirror)


def _open_tracker(name: str, workdir: Path, config: Mapping[str, Any]) -> MetricWriter:
    # Imported on use: most runs have no tracker, and a tracker is an optional package.
    if name == "wandb":
        from tokenrec.runtime.wandb_writer import WandbWriter

        return WandbWriter(workdir, config=config)
    from tokenrec.runtime.mlflow_writer import MlflowWriter

    return MlflowWriter(workdir, config=config)
