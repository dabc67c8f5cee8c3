"""Where a run writes what it measures: JSON lines, TensorBoard, a progress bar; examples/s; the table at the end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

from tensorboardX import SummaryWriter
from tqdm import tqdm

from tokenrec.errors import InputError

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

# Names in the values of `Logbook.log` that the progress line shows.
LOSS, RATE = "loss", "examples_per_second"

_LOGS_PER_LINE = 5
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix} [{elapsed} gone, {remaining} left]"


class Logbook:
    """Writes the values of a run's steps to `workdir`, and progress to stderr. A context manager; one process writes.

    `metrics.jsonl` holds a line `{"step", "time", "PREFIX/NAME": value, ...}` per call of `log`; a value that is
    undefined, NaN or infinite is null. A run that starts at `start_step`, restored from a checkpoint, first drops the
    later lines of the run that was killed (all lines, if it starts at 0); TensorBoard hides the same steps.

    With `progress`, stderr shows a bar if it is a terminal, and otherwise a plain line every few logs of training;
    either shows the training values named "loss" and "examples_per_second". Every log of another prefix is a line.

    Raises:
      InputError: `metrics.jsonl` of an earlier run cannot be read, or nothing can be written there, now or later.
    """

    def __init__(
        self, workdir: Path, *, progress: bool, total_steps: int, start_step: int
    ) -> None:
        self._path = Path(workdir) / METRICS_FILE
        self._total_steps, self._start_step = total_steps, start_step
        self._began, self._logs, self._progress = time.monotonic(), 0, progress
        with _writing(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _rewrite(self._path, lambda record: 0 < start_step >= record["step"])
            self._repeated = [
                record
                for record in read_log(self._path)
                if record["step"] == start_step
            ]
            self._file = self._path.open("a", encoding="utf-8")
            folder = str(Path(workdir) / TENSORBOARD_FOLDER)
            self._tensorboard = SummaryWriter(
                folder, purge_step=start_step + 1 if start_step else 0
            )
        self._bar: tqdm | None = None
        if progress and sys.stderr.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                desc="train",
                bar_format=_BAR,
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def log(
        self,
        step: int,
        values: Mapping[str, SupportsFloat | None],
        prefix: str = "train",
    ) -> None:
        """Records the values of a step, numbers or zero-dimensional arrays, under `prefix`."""
        numbers = {name: _finite(value) for name, value in values.items()}
        line = {"step": step, "time": round(time.time(), 3)} | {
            f"{prefix}/{k}": v for k, v in numbers.items()
        }
        with _writing(self._path.parent):
            if step == self._start_step and any(
                _has_prefix(record, prefix) for record in self._repeated
            ):
                self._drop_repeated(prefix)
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            for name, number in numbers.items():
                if (
                    number is not None
                ):  # TensorBoard has no null, and the writer complains about NaN
                    self._tensorboard.add_scalar(f"{prefix}/{name}", number, step)
        if self._progress:
            self._show(step, numbers, prefix)

    def __enter__(self) -> Logbook:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Flushes and closes everything; more than one call is harmless."""
        with _writing(self._path.parent), contextlib.ExitStack() as stack:
            stack.callback(self._tensorboard.close)
            stack.callback(self._file.close)
            if self._bar is not None:
                self._bar.close()

    def _drop_repeated(self, prefix: str) -> None:
        """An evaluation at the step of the checkpoint was logged before the stop, and runs again after the restart."""
        self._repeated = [
            record for record in self._repeated if not _has_prefix(record, prefix)
        ]
        self._file.close()
        _rewrite(
            self._path,
            lambda record: (
                record["step"] != self._start_step or not _has_prefix(record, prefix)
            ),
        )
        self._file = self._path.open("a", encoding="utf-8")

    def _show(
        self, step: int, numbers: Mapping[str, float | None], prefix: str
    ) -> None:
        if prefix != "train":
            text = "  ".join(
                f"{name} {_text(number)}"
                for name, number in numbers.items()
                if "/" not in name
            )
            self._print(f"{prefix} at step {step:,}: {text}")
            return
        shown = []
        if LOSS in numbers:
            shown.append(f"loss {_text(numbers[LOSS])}")
        if numbers.get(RATE) is not None:
            shown.append(f"{numbers[RATE]:,.0f} examples/s")
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(shown), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        if self._logs % _LOGS_PER_LINE == 0 or step == self._total_steps:
            done = step - self._start_step
            if done > 0:
                left = (
                    (time.monotonic() - self._began) * (self._total_steps - step) / done
                )
                shown.append(f"{tqdm.format_interval(left)} left")
            self._print("  ".join([f"step {step:,}/{self._total_steps:,}", *shown]))
        self._logs += 1

    def _print(self, line: str) -> None:
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            tqdm.write(line, file=sys.stderr)  # above the bar


class Throughput:
    """Examples per second of the time spent on them.

    Work that is not training runs inside `with throughput.excluded():`; the first step, which compiles, belongs there
    and is not added. `clock` returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self._examples = 0
        self._total_examples, self._total_seconds = 0, 0.0

    def add(self, examples: int) -> None:
        """Counts examples that were processed since the last `rate`."""
        self._examples += examples

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """The time inside does not count."""
        began = self._clock()
        try:
            yield
        finally:
            self._since += self._clock() - began

    def rate(self) -> float | None:
        """Examples per second since the last call, which must have waited for the device; None if no time passed."""
        now = self._clock()
        seconds, examples = now - self._since, self._examples
        self._since, self._examples = now, 0
        self._total_seconds += seconds
        self._total_examples += examples
        return examples / seconds if seconds > 0 else None

    def average(self) -> float | None:
        """Examples per second over all calls of `rate` so far; None if no time passed."""
        return (
            self._total_examples / self._total_seconds
            if self._total_seconds > 0
            else None
        )


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as an aligned text table; columns in order of appearance, None or absent is "-".

    Rows with the same value in the first column, one after the other, form a group that names it once.

    >>> print(format_table([{"model": "ours", "task": "click", "AUC": 0.75}, {"model": "ours", "task": "like"}]))
    model  task      AUC
    -----  -----  ------
    ours   click  0.7500
           like        -
    """
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_text(row.get(name)) for name in names] for row in rows]
    number = [not any(isinstance(row.get(name), str) for row in rows) for name in names]
    widths = [
        max(len(name), *(len(line[i]) for line in cells))
        for i, name in enumerate(names)
    ]
    lines = [names, ["-" * width for width in widths]]
    for i, line in enumerate(cells):
        same = len(names) > 1 and i > 0 and line[0] == cells[i - 1][0]
        lines.append(["" if same else line[0], *line[1:]])
    aligned = (
        "  ".join(
            c.rjust(w) if right else c.ljust(w)
            for c, w, right in zip(line, widths, number, strict=True)
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in aligned)


def result_rows(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `format_table`, one per model and task, or per model of retrieval.

    `results`: model name -> summary in the form of `metrics.summarize` or `retrieval.summarize`; a report may lack
    metrics.
    """
    found = [
        (model, summary["retrieval"])
        for model, summary in results.items()
        if "retrieval" in summary
    ]
    if found:
        return [{"model": model} | report for model, report in found]
    columns = {
        "AUC": "auc",
        "GAUC": "gauc",
        "log loss": "log_loss",
        "NE": "normalized_entropy",
        "positives": "positives",
        "examples": "examples",
    }
    return [
        {"model": model, "task": task}
        | {column: report.get(key) for column, key in columns.items()}
        for model, summary in results.items()
        for task, report in summary["tasks"].items()
    ]


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """An error of a write does not say where it was."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"the log in '{folder}' cannot be written: {error.strerror or error}; make room, and give the same command "
            "again, which goes on from the last checkpoint"
        ) from error


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _finite(value: SupportsFloat | None) -> float | None:
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


def _has_prefix(record: Mapping[str, Any], prefix: str) -> bool:
    return any(name.startswith(prefix + "/") for name in record)


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a run's `metrics.jsonl`, none if it is not there. A last line that is not finished is skipped: a killed
    run left it, or a running one writes it.

    Raises:
      InputError: another line is not a JSON object with a step.
    """
    lines = (
        path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if path.exists()
        else []
    )
    for i, line in enumerate(lines):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("no step")
        except ValueError as error:
            if i == len(lines) - 1 and not line.endswith("\n"):
                return
            reason = f"line {i + 1} is not a JSON object with a step ({error}); move the file away"
            raise InputError(f"{path}: {reason}") from error
        yield record


def _rewrite(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Keeps some lines; the file is replaced at once, so that a kill leaves the old or the new one."""
    kept = "".join(
        json.dumps(record) + "\n" for record in read_log(path) if keep(record)
    )
    if not path.exists() or path.read_text(encoding="utf-8", errors="replace") == kept:
        return
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
