"""Weights & Biases as a metric writer (extra `wandb`).

Variables of the environment configure it: `WANDB_MODE=offline` writes to
`WORKDIR/wandb` only, for `wandb sync`; `WANDB_PROJECT` and `WANDB_ENTITY` name the
place; `WANDB_API_KEY` or `wandb login` gives access.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from tokenrec.errors import InputError
from tokenrec.runtime.metric_writer import finite_values, raise_write_errors
from tokenrec.runtime.trackers import (
    PROJECT,
    import_tracker,
    is_stop,
    load_run_id,
    save_run_id,
    warn_tracker_stopped,
)

NAME = "wandb"


class WandbWriter:
    """Write metrics named `PREFIX/NAME` to a run of Weights & Biases.

    The tracker's run has the name of the folder. A run that resumes goes on in the same
    run of the tracker; steps that it already has are not written again, as they would
    have the same values.

    Args:
      workdir: folder of the run.
      config: the run's config.

    Raises:
      InputError: `wandb` is not installed, or refuses the run (no login, no network).
    """

    def __init__(self, workdir: Path, *, config: Mapping[str, Any]) -> None:
        self._wandb = import_tracker(NAME)
        self._is_open = False
        self._exit_code = 0
        folder = Path(workdir).absolute()
        with raise_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._run = self._wandb.init(
                    project=os.environ.get("WANDB_PROJECT", PROJECT),
                    name=folder.name,
                    id=load_run_id(folder, NAME),
                    dir=folder,
                    config=dict(config),
                    # Go on in the run with this id if W&B has it, else start one.
                    resume="allow",
                    # The run's own log stays as it is: no copy of stdout and stderr.
                    settings=self._wandb.Settings(console="off"),
                )
            except self._wandb.errors.Error as error:
                raise InputError(
                    f"train.trackers: wandb refuses the run: {error}; use `wandb login` "
                    "or set WANDB_MODE=offline"
                ) from error
            save_run_id(folder, NAME, self._run.id)
            # W&B drops steps that it has already, with a warning for each.
            self._first_step = self._run.starting_step
        self._is_open = True

    def write(
        self,
        step: int,
        values: Mapping[str, SupportsFloat | None],
        prefix: str = "train",
    ) -> None:
        """Queue the finite values; another process uploads them.

        An error of the tracker ends its use, not the run: a warning names it.

        Args:
          step: number of updates made so far.
          values: metric name -> number; None if undefined.
          prefix: group of the metrics.
        """
        if not self._is_open or step < self._first_step:
            return
        metrics = {
            f"{prefix}/{name}": value
            for name, value in finite_values(values).items()
            if value is not None
        }
        with self._stop_on_errors():
            self._run.log(metrics, step=step)

    def end_with(self, error: BaseException) -> None:
        """Let `close` mark the run as preempted or failed, and not as finished."""
        self._exit_code = 1
        if self._is_open and is_stop(error):
            with self._stop_on_errors():
                # With it, an exit code that is not 0 means preempted.
                self._run.mark_preempting()

    def close(self) -> None:
        """Wait for the upload and finish; further calls do nothing."""
        if self._is_open:
            with self._stop_on_errors():
                self._run.finish(exit_code=self._exit_code)
            self._is_open = False

    @contextlib.contextmanager
    def _stop_on_errors(self) -> Iterator[None]:
        try:
            yield
        # Errors of its own process and connection have many types, some of them internal.
        except Exception as error:  # noqa: BLE001 - no error of a tracker ends a run
            self._is_open = False
            warn_tracker_stopped(NAME, error)
