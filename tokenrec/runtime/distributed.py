"""Processes of one run: join them, compare their settings, and fail together.

A run on several hosts is one process per host, each with the same command. If one of
them stops alone, the others wait for it forever in their next collective operation; the
functions here make all processes raise the same error instead. In a run of a single
process they do nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from tokenrec.errors import InputError, StorageError
from tokenrec.runtime.retry import is_transient

# JAX counts a process as dead after this time without a heartbeat, and ends the others.
HEARTBEAT_SECONDS = 100
# Time that the other processes have to print their errors before process 0 ends.
_GRACE_SECONDS = 2

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(*, sigterm_stops_run: bool = False) -> None:
    """Join the other processes; call it before any other function of JAX.

    If the variables `JAX_COORDINATOR_ADDRESS` (host:port of process 0),
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` are all set, they say who the processes are.
    Otherwise JAX asks the TPU pod, Slurm, Open MPI or Kubernetes. JAX aborts the process
    if the others do not join within 300 seconds. Further calls do nothing.

    Args:
      sigterm_stops_run: SIGTERM does not end the process that gets it; JAX tells all
        processes, and they stop together (`tokenrec/runtime/preemption.py`).

    Raises:
      InputError: nothing says who the processes are, or the port of process 0 is taken.
    """
    if jax.distributed.is_initialized():
        return
    values = [os.environ.get(name) for name in _VARIABLES]
    jax.config.update("jax_enable_preemption_service", sigterm_stops_run)
    try:
        if all(values):
            address, *numbers = values
            process_count, process_index = (
                _parse_number(name, text)
                for name, text in zip(_VARIABLES[1:], numbers, strict=True)
            )
            jax.distributed.initialize(
                address,
                process_count,
                process_index,
                # The variables are complete: a cluster that JAX finds must not win.
                cluster_detection_method="deactivate",
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        else:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        settings = ", ".join(
            f"{name}={value!r}"
            for name, value in zip(_VARIABLES, values, strict=True)
            if value
        )
        raise InputError(
            "--distributed: cannot join the other processes "
            f"({settings or 'no variable set'}); set {', '.join(_VARIABLES)} in each of "
            f"them, or start them on a TPU pod or under Slurm. JAX says: {error}"
        ) from error


def _parse_number(name: str, text: str | None) -> int:
    if text is None or not text.isdecimal():
        raise InputError(f"{name}={text!r} is not a whole number of 0 or more")
    return int(text)


def is_first_process() -> bool:
    """Whether this process writes the shared files and prints for the user."""
    return jax.process_index() == 0


def broadcast_from_first(value: int) -> int:
    """Return the value that the first process passes; also a barrier."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def gather_from_all(text: str) -> list[str]:
    """Return the texts of all processes, in the order of their indices."""
    if jax.process_count() == 1:
        return [text]
    # Collectives need arrays of one shape: texts are padded to the longest one.
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(max(int(np.max(lengths)), 1), np.uint8)
    padded[: len(data)] = data
    texts = np.asarray(multihost_utils.process_allgather(padded))
    return [
        row[:length].tobytes().decode()
        for row, length in zip(texts, lengths, strict=True)
    ]


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """Raise an error on all processes if any process raised one inside.

    A process without a problem of its own raises an InputError, or a StorageError if
    all problems are faults of the storage. The end of the block is a barrier, so nothing
    inside may wait for another process.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        problem = error
    if jax.process_count() == 1:
        return
    # Every process reaches this line, with or without a problem of its own.
    problems = gather_from_all("" if problem is None else _describe(problem))
    # Here it has its traceback; the others raise a copy of its message.
    if problem is not None:
        raise problem
    if any(problems):
        raise _joint_error([text for text in problems if text])


def _describe(problem: Exception) -> str:
    kind = "storage" if is_transient(problem) else "input"
    known = isinstance(problem, InputError | OSError)
    text = str(problem) if known else f"{type(problem).__name__}: {problem}"
    return f"{kind}:process {jax.process_index()}: {text}"


def _joint_error(problems: list[str]) -> InputError | StorageError:
    """The error of a process without a problem of its own, from those of the others."""
    kinds, texts = zip(*(text.split(":", maxsplit=1) for text in problems), strict=True)
    message = "\n".join(texts)
    # Wrong input stays wrong when the storage is back.
    return InputError(message) if "input" in kinds else StorageError(message)


def assert_same_on_all_processes(values: Mapping[str, object]) -> None:
    """Check that every process passes the values of the first process.

    Args:
      values: name -> value that JSON can represent; other values are compared as text.

    Raises:
      InputError: on all processes, if a value differs on any; names the differences.
    """
    if jax.process_count() == 1:
        return
    local = {
        name: json.dumps(value, sort_keys=True, default=str)
        for name, value in values.items()
    }
    first = json.loads(_broadcast_text(json.dumps(local)))
    differing = [
        name
        for name in sorted(local.keys() | first.keys())
        if local.get(name) != first.get(name)
    ]
    with raise_on_all_processes():
        if differing:
            process = jax.process_index()
            lines = "".join(
                f"\n  {name}: {first.get(name)} in process 0, "
                f"{local.get(name)} in process {process}"
                for name in differing
            )
            raise InputError(
                f"the processes have different settings; make these equal:{lines}"
            )


def exit_immediately(code: int) -> NoReturn:
    """End this process with an exit code; do not wait for the others.

    An orderly exit would wait in JAX's shutdown barrier, which processes that hang in a
    collective operation never reach.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        # JAX ends the others when the first process is gone.
        time.sleep(_GRACE_SECONDS)
    os._exit(code)


def _broadcast_text(text: str) -> str:
    """Return the text that the first process passes."""
    data = np.frombuffer(text.encode(), np.uint8)
    # The others need the length to pass an array of the same shape.
    length = broadcast_from_first(len(data))
    local = data if is_first_process() else np.zeros(length, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(local)).tobytes().decode()
