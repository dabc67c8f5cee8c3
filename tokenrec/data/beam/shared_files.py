"""Files through which the passes and their workers pass things on, in a folder that all of them see.

The folder may be a path on a shared disk or the address of a bucket, as `etils.epath` opens them.
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
    """Pickles `value` to `work/name`. Of two workers that do the same work, either file is right."""
    path = epath.Path(work) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    unique.write_bytes(pickle.dumps(value))
    unique.replace(path)


def load(work: str, folder: str) -> Iterator[Any]:
    """What `save_records` wrote to `work/folder`, by name."""
    directory = epath.Path(work) / folder
    if directory.exists():
        for path in sorted(directory.iterdir(), key=lambda p: p.name):
            if not path.name.startswith("."):
                yield pickle.loads(path.read_bytes())


def save_values(work: str, name: str, values: np.ndarray) -> None:
    """Writes distinct values, sorted, `[n]` int64 or object (strings), for `load_values`."""
    array = pa.array(
        values, pa.large_string() if values.dtype == object else pa.int64()
    )
    batch = pa.record_batch({"value": array})
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
    """What `save_values` wrote, memory-mapped: worker processes of one machine share its memory."""
    path = epath.Path(work) / name
    if isinstance(path, Path):
        return _mapped(os.fspath(path))
    with tempfile.NamedTemporaryFile() as local, path.open("rb") as source:
        shutil.copyfileobj(source, local)
        local.flush()
        return _mapped(local.name)  # the mapping outlives the name


def _mapped(path: str) -> pa.Array:
    return pa.ipc.open_file(pa.memory_map(path)).get_batch(0).column("value")
