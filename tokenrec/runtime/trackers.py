"""Shared parts of the experiment trackers: optional packages, run ids, warnings."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Protocol, runtime_checkable

from tokenrec.errors import InputError, Stopped
from tokenrec.runtime.files import parse_json, write_json

# `{"TRACKER": "run id"}`: a run that resumes goes on in the same run of the tracker.
RUN_IDS_FILE = "trackers.json"
# Project of Weights & Biases and experiment of MLflow, unless a variable names another.
PROJECT = "tokenrec"


@runtime_checkable
class OutcomeWriter(Protocol):
    """A metric writer that shows how a run ended."""

    def end_with(self, error: BaseException) -> None:
        """Note the error by which the run ends, before `close`."""


def is_stop(error: BaseException) -> bool:
    """Whether a run ends by a signal, so that it can go on later."""
    return isinstance(error, Stopped | KeyboardInterrupt)


def import_tracker(package: str) -> ModuleType:
    """Import the package of a tracker, which the extra of the same name installs.

    Raises:
      InputError: the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"train.trackers: '{package}' cannot be imported ({error}); install it with "
            f"`pip install '.[{package}]'`, or leave it out of train.trackers"
        ) from error


def load_run_id(workdir: Path, tracker: str) -> str | None:
    """Id that an earlier start of this run got from the tracker; None at the first."""
    path = Path(workdir) / RUN_IDS_FILE
    if not path.is_file():
        return None
    return _read_run_ids(path).get(tracker)


def save_run_id(workdir: Path, tracker: str, run_id: str) -> None:
    """Keep the id that the tracker gave this run.

    Args:
      workdir: folder of the run.
      tracker: name of the tracker.
      run_id: id in the tracker.
    """
    path = Path(workdir) / RUN_IDS_FILE
    run_ids = _read_run_ids(path) if path.is_file() else {}
    write_json(path, run_ids | {tracker: run_id})


def warn_tracker_stopped(tracker: str, error: Exception) -> None:
    """Say once that a tracker gets no more metrics; the run goes on without it."""
    print(
        f"tokenrec: {tracker} failed and gets no more metrics of this run: {error!r}; "
        "all metrics are in metrics.jsonl",
        file=sys.stderr,
    )


def flat_config(config: dict[str, object], prefix: str = "") -> dict[str, str]:
    """Config fields by dotted name, for trackers that have flat parameters."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flat_config(value, f"{prefix}{name}.")
        else:
            # Trackers compare parameters as text: tuples and lists must look alike.
            flat[prefix + name] = json.dumps(value)
    return flat


def _read_run_ids(path: Path) -> dict[str, str]:
    run_ids = parse_json(
        path.read_bytes(), f"'{path}'", "delete it; the trackers then start new runs"
    )
    return {str(tracker): str(run_id) for tracker, run_id in dict(run_ids).items()}
