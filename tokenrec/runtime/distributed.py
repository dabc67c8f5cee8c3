"""Several processes of one run: they join, agree on what to do, and fail together. For one alone nothing happens.

A process that stops while the others go on would leave them waiting for it in the next exchange between devices.
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

from tokenrec.errors import InputError

# A process that was not heard of for so long is taken for dead, and the others end.
HEARTBEAT_SECONDS = 100
_LAST_WORDS_SECONDS = 2

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(*, hears_stop: bool = False) -> None:
    """Joins the other processes, once; call it before anything else of JAX. If they do not come within 300 seconds,
    JAX aborts the process.

    Args:
      hears_stop: SIGTERM does not end the process: JAX tells all processes of it (`interruption.py`).

    The variables `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` decide if
    all three are set; otherwise JAX asks the TPU pod, Slurm, Open MPI or Kubernetes.

    Raises:
      InputError: it is not said who the processes are, or the port of process 0 is taken.
    """
    if jax.distributed.is_initialized():
        return
    given = [os.environ.get(name) for name in _VARIABLES]
    jax.config.update("jax_enable_preemption_service", hears_stop)
    try:
        if all(given):
            address, *numbers = given
            count, index = (
                _number(name, text)
                for name, text in zip(_VARIABLES[1:], numbers, strict=True)
            )
            jax.distributed.initialize(
                address,
                count,
                index,
                cluster_detection_method="deactivate",
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        else:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        known = ", ".join(
            f"{name}={value!r}"
            for name, value in zip(_VARIABLES, given, strict=True)
            if value
        )
        raise InputError(
            f"--distributed: cannot join the other processes ({known or 'no variable set'}); set "
            f"{', '.join(_VARIABLES)} in each of them, or start them on a TPU pod or under Slurm. JAX says: {error}"
        ) from error


def _number(name: str, text: str | None) -> int:
    if text is None or not text.isdecimal():
        raise InputError(f"{name}={text!r} is not a whole number of 0 or more")
    return int(text)


def is_first_process() -> bool:
    """Whether this is the process that writes the files that all have in common, and speaks."""
    return jax.process_index() == 0


def broadcast_from_first(value: int) -> int:
    """The value of the first process."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def gather_from_all(text: str) -> list[str]:
    """The texts of all processes."""
    if jax.process_count() == 1:
        return [text]
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
    """Wrong input that any process finds inside is an InputError in every process at the end. Nothing inside may
    wait for another process.
    """
    problem: InputError | None = None
    try:
        yield
    except InputError as error:
        if jax.process_count() == 1:
            raise
        problem = error
    if jax.process_count() == 1:
        return
    problems = gather_from_all(
        "" if problem is None else f"process {jax.process_index()}: {problem}"
    )
    if problem is not None:
        raise problem
    if any(problems):
        raise InputError("\n".join(text for text in problems if text))


def assert_same_on_all_processes(values: Mapping[str, object]) -> None:
    """Checks that the values are those of the first process.

    Raises:
      InputError: in every process, if they differ in any; names what differs.
    """
    if jax.process_count() == 1:
        return
    own = {
        name: json.dumps(value, sort_keys=True, default=str)
        for name, value in values.items()
    }
    first = json.loads(_text_of_first(json.dumps(own)))
    differing = [
        name
        for name in sorted(own.keys() | first.keys())
        if own.get(name) != first.get(name)
    ]
    with raise_on_all_processes():
        if differing:
            listed = "".join(
                f"\n  {name}: {first.get(name)} in process 0, {own.get(name)} in process {jax.process_index()}"
                for name in differing
            )
            raise InputError(
                f"the processes were not started alike; make these equal:{listed}"
            )


def exit_immediately(code: int) -> NoReturn:
    """Ends this process at once with an exit code, instead of waiting for the others as an orderly exit does."""
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(
            _LAST_WORDS_SECONDS
        )  # the others end with the first: let them say what they found
    os._exit(code)


def _text_of_first(text: str) -> str:
    data = np.frombuffer(text.encode(), np.uint8)
    length = broadcast_from_first(len(data))
    mine = data if is_first_process() else np.zeros(length, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes().decode()
