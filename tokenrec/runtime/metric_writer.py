"""Metric writers: the interface, `metrics.jsonl` and TensorBoard.

A run writes its metrics through `RunLog` (`run_log.py`), which passes them to every
writer. The writers of `wandb_writer.py` and `mlflow_writer.py` and the progress display
of `progress.py` have the same interface.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

from tensorboardX import SummaryWriter

from tokenrec.errors import InputError
from tokenrec.runtime.files import write_text_atomically

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
    a run that starts at 0 drops all lines.

    Args:
      workdir: folder of the run; it is created if missing.
      start_step: step at which the run starts.

    Raises:
      InputError: `metrics.jsonl` cannot be read or written, now or in a later call.
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
            self._file = self._path.open("a", encoding="utf-8")

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
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            # To the operating system: a kill of the process loses nothing. A power
            # failure may, but then the run resumes from a checkpoint and writes the
            # lines again.
            self._file.flush()

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
        self._file = self._path.open("a", encoding="utf-8")


class TensorBoardWriter:
    """Write TensorBoard scalars named `PREFIX/NAME` to `WORKDIR/tensorboard`.

    Values that are undefined, NaN or infinite are left out. TensorBoard hides what an
    interrupted run wrote after `start_step`.

    Args:
      workdir: folder of the run.
      start_step: step at which the run starts.
      config: the run's config, shown under "Text"; None writes no text.

    Raises:
      InputError: the folder cannot be written, now or in a later call.
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
        with raise_write_errors(self._folder):
            for name, value in finite_values(values).items():
                # TensorBoard has no null, and SummaryWriter prints a warning for NaN.
                if value is not None:
                    self._writer.add_scalar(f"{prefix}/{name}", value, step)

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
        with raise_write_errors(self._folder):
            # The name is that of a subfolder; by default it is the time, and a resumed
            # run would leave one for each start.
            self._writer.add_hparams(hparams, metrics, name="result")

    def close(self) -> None:
        """Flush and close the event file; further calls do nothing."""
        with raise_write_errors(self._folder):
            self._writer.close()


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
    """Turn an OSError, which does not name the folder, into an InputError that does."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"the log in '{folder}' cannot be written: {error.strerror or error}; free "
            "disk space and rerun the same command to resume from the last checkpoint"
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
    # A torn last line can end inside a character; JSON then refuses it.
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            # A foreign file must not be cut back as if it were our log.
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("no step")
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                return
            raise InputError(
                f"{path}: line {number} is not a JSON object with a step ({error}); "
                "move the file away"
            ) from error
        yield record


def _has_prefix(record: Mapping[str, Any], prefix: str) -> bool:
    return any(name.startswith(prefix + "/") for name in record)


def _keep_records(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Rewrite the file with the records for which `keep` is true."""
    records = [record for record in read_log(path) if keep(record)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    # The usual case, in which nothing is written: the file ends at the checkpoint.
    if not path.exists() or path.read_text(encoding="utf-8", errors="replace") == text:
        return
    write_text_atomically(path, text)
