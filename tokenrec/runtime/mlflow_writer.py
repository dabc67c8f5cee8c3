"""MLflow as a metric writer (extra `mlflow`).

`MLFLOW_TRACKING_URI` names the server or database, and `MLFLOW_EXPERIMENT_NAME` the
experiment. Without them metrics go to the SQLite file `WORKDIR/mlflow.db`, which
`mlflow ui --backend-store-uri sqlite:///WORKDIR/mlflow.db` shows.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from tokenrec.errors import InputError
from tokenrec.runtime.metric_writer import finite_values, raise_write_errors
from tokenrec.runtime.trackers import (
    PROJECT,
    flat_config,
    import_tracker,
    is_stop,
    load_run_id,
    save_run_id,
    warn_tracker_stopped,
)

NAME = "mlflow"
DATABASE_FILE = "mlflow.db"
ARTIFACTS_FOLDER = "mlflow_artifacts"
# Limit of MLflow for one request.
_PARAMS_PER_REQUEST = 100
# Limit of MLflow for a name is 250, of which some are left for a number.
_LONGEST_NAME = 240


class MlflowWriter:
    """Write metrics named `PREFIX/NAME` to a run of MLflow.

    The tracker's run has the name of the folder, and the fields of the config as
    parameters. A run that resumes goes on in the same run of the tracker; steps made
    twice have two points of equal value there. MLflow allows no "@" in names, so
    `recall@10` is `recall_at_10` there.

    Args:
      workdir: folder of the run.
      config: the run's config.

    Raises:
      InputError: `mlflow` is not installed, or the server refuses the run.
    """

    def __init__(self, workdir: Path, *, config: Mapping[str, Any]) -> None:
        self._mlflow = import_tracker(NAME)
        self._is_open = False
        self._status = "FINISHED"
        folder = Path(workdir).absolute()
        self._uri = os.environ.get(
            "MLFLOW_TRACKING_URI", f"sqlite:///{folder / DATABASE_FILE}"
        )
        with raise_write_errors(folder), self._raise_refusals():
            folder.mkdir(parents=True, exist_ok=True)
            # A client, not the global functions of `mlflow`, which keep one active run
            # per thread that code around the training loop may use.
            self._client = self._mlflow.MlflowClient(tracking_uri=self._uri)
            run_id = load_run_id(folder, NAME)
            if run_id is None:
                run_id = self._create_run(folder, config)
                save_run_id(folder, NAME, run_id)
            else:
                # The first part of the run marked it as ended.
                self._client.update_run(run_id, status="RUNNING")
            self._run_id = run_id
        self._is_open = True

    def write(
        self,
        step: int,
        values: Mapping[str, SupportsFloat | None],
        prefix: str = "train",
    ) -> None:
        """Write the finite values; the call returns when the server has them.

        An error of the tracker ends its use, not the run: a warning names it.

        Args:
          step: number of updates made so far.
          values: metric name -> number; None if undefined.
          prefix: group of the metrics.
        """
        if not self._is_open:
            return
        # One time for all metrics of the step.
        milliseconds = int(time.time() * 1000)
        metrics = [
            self._mlflow.entities.Metric(
                _metric_name(f"{prefix}/{name}"), value, milliseconds, step
            )
            for name, value in finite_values(values).items()
            if value is not None
        ]
        with self._stop_on_errors():
            self._client.log_batch(self._run_id, metrics=metrics)

    def end_with(self, error: BaseException) -> None:
        """Let `close` mark the run as killed or failed, and not as finished."""
        self._status = "KILLED" if is_stop(error) else "FAILED"

    def close(self) -> None:
        """Mark how the tracker's run ended; further calls do nothing."""
        if self._is_open:
            with self._stop_on_errors():
                self._client.set_terminated(self._run_id, status=self._status)
            self._is_open = False

    @contextlib.contextmanager
    def _raise_refusals(self) -> Iterator[None]:
        try:
            yield
        except self._mlflow.exceptions.MlflowException as error:
            raise InputError(
                f"train.trackers: mlflow refuses the run at '{self._uri}': {error}; set "
                "MLFLOW_TRACKING_URI to a server or database that can be written"
            ) from error

    @contextlib.contextmanager
    def _stop_on_errors(self) -> Iterator[None]:
        try:
            yield
        # After one error, each further call could wait for all its retries again.
        except Exception as error:  # noqa: BLE001 - no error of a tracker ends a run
            self._is_open = False
            warn_tracker_stopped(NAME, error)

    def _create_run(self, folder: Path, config: Mapping[str, Any]) -> str:
        # 1. The experiment, which other runs of the same server may have created.
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:
            # Without a location MLflow would create folders where the command runs.
            location = None
            if self._uri.startswith("sqlite:"):
                location = (folder / ARTIFACTS_FOLDER).as_uri()
            experiment_id = self._client.create_experiment(name, location)
        # 2. The run, with the config as its parameters.
        run_id = self._client.create_run(
            experiment_id, run_name=folder.name
        ).info.run_id
        values = flat_config(dict(config))
        params = [
            self._mlflow.entities.Param(name, value)
            for name, value in zip(_param_names(values), values.values(), strict=True)
        ]
        for first in range(0, len(params), _PARAMS_PER_REQUEST):
            self._client.log_batch(
                run_id, params=params[first : first + _PARAMS_PER_REQUEST]
            )
        return run_id


def _metric_name(name: str) -> str:
    """Replace the characters that MLflow does not allow in names."""
    return re.sub(r"[^/\w.\- ]", "_", name.replace("@", "_at_"))


def _param_names(fields: Iterable[str]) -> list[str]:
    """Names of config fields for MLflow, all different.

    A key of a mapping, such as a template of `head.alignment`, may be any text.

    >>> _param_names(["head.alignment.{sid}? {title}", "head.alignment.{sid}! {title}"])
    ['head.alignment._sid__ _title_', 'head.alignment._sid__ _title__2']
    """
    names: list[str] = []
    seen: Counter[str] = Counter()
    for field in fields:
        name = _metric_name(field).replace("/", "_")[:_LONGEST_NAME]
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names
