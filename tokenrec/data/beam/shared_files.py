"""Files through which the two passes and their workers exchange results.

They lie in a folder that the driver and all workers see: a path on a shared disk, or
the address of a bucket, as `etils.epath` opens it. Values are pickled, as Beam itself
does; whoever can write to the folder can run code on the workers (docs/guides/beam.md).
"""

from __future__ import annotations

import functools
import os
import pickle
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath


def save_records(work: str, name: str, value: Any) -> None:
    """Pickle a value for `load_records`.

    Beam may run the same work on two workers. Both then write the same value, and
    either file is right.

    Args:
      work: folder that all workers see.
      name: path of the file in it.
      value: the value.
    """
    path = epath.Path(work) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # The rename makes the file appear complete; the unique name keeps two workers
    # apart.
    unique = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    unique.write_bytes(pickle.dumps(value))
    unique.replace(path)


def save_scan_result(value: Any, work: str, name: str) -> None:
    """Pickle a result of the scan to `scan/<name>`; None, for no result, is not saved.

    Args:
      value: the result; first, as `beam.Map` passes it.
      work: folder that all workers see.
      name: name of the result.
    """
    if value is not None:
        save_records(work, f"scan/{name}/all", value)


def load_records(work: str, folder: str) -> Iterator[Any]:
    """Yield the values that `save_records` wrote to `work/folder`, sorted by name."""
    for name in record_names(work, folder):
        yield load_record(work, name)


def record_names(work: str, folder: str) -> list[str]:
    """Return the names of the values that `save_records` wrote to a folder, sorted."""
    directory = epath.Path(work) / folder
    if not directory.exists():
        return []
    names = sorted(path.name for path in directory.iterdir())
    # A dot marks the file of a worker that was stopped while it wrote.
    return [f"{folder}/{name}" for name in names if not name.startswith(".")]


def load_record(work: str, name: str) -> Any:
    """Return the value that `save_records` wrote to `work/name`."""
    return pickle.loads((epath.Path(work) / name).read_bytes())


def save_values(work: str, name: str, values: np.ndarray) -> None:
    """Write distinct values for `load_values`.

    Args:
      work: folder that all workers see.
      name: path of the file in it.
      values: `[n]`, sorted, int64 or object (strings).
    """
    array = pa.array(
        values, pa.large_string() if values.dtype == object else pa.int64()
    )
    batch = pa.record_batch({"value": array})
    # Arrow writes local files only, so that a file for a bucket is made here and
    # copied.
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, "values.arrow")
        with (
            pa.OSFile(os.fspath(local), "wb") as file,
            pa.ipc.new_file(file, batch.schema) as writer,
        ):
            writer.write_batch(batch)
        path = epath.Path(work) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with local.open("rb") as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)


@functools.cache
def load_values(work: str, name: str) -> pa.Array:
    """Return the values that `save_values` wrote, memory-mapped: `[n]`.

    Worker processes of one machine share the memory of the mapping. It stays open for
    the life of the process, so each run needs a `work` of its own.
    """
    path = epath.Path(work) / name
    if isinstance(path, Path):
        return _map_values(os.fspath(path))
    with tempfile.NamedTemporaryFile() as local, path.open("rb") as source:
        shutil.copyfileobj(source, local)
        local.flush()
        # The mapping keeps the file's data after its name is gone.
        return _map_values(local.name)


def _map_values(path: str) -> pa.Array:
    return pa.ipc.open_file(pa.memory_map(path)).get_batch(0).column("value")
