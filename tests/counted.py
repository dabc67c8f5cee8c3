"""Which rows of the log a run's steps read: what is handed to the loop, seen on its way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tokenrec import active_run
from tokenrec.data.pipeline import train_batches


def count_rows(seen: Callable[[list[int]], object]) -> Callable[..., Iterator[Any]]:
    """`train_batches` that tells the rows of each batch when the loop takes it."""

    def counted(*args: Any, **named: Any) -> Iterator[Any]:
        with contextlib.closing(train_batches(*args, **named)) as batches:
            for host in batches:
                seen(sorted(host.rows[host.rows >= 0].tolist()))
                yield host

    return counted


def count_in_file(path: str) -> None:
    """Every later run of this process adds a line for each of its batches to the file at `path`."""
    file = open(path, "a", buffering=1)  # noqa: SIM115 - it lives as long as the process, which may be killed
    active_run.train_batches = count_rows(lambda rows: print(rows, file=file))  # type: ignore[assignment]
