"""Collect record batches in a temporary file, as a table that is mapped from it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable

import pyarrow as pa


def spooled_table(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """Make a table of `batches`, of which memory need not hold more than one.

    The file is in the folder for temporary files (`TMPDIR`). It has no name any more
    when this returns, so that it ends with the table or with the process.
    """
    descriptor, path = tempfile.mkstemp(prefix="tokenrec-", suffix=".arrow")
    os.close(descriptor)
    try:
        with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        with pa.memory_map(path) as mapped:
            return pa.ipc.open_file(mapped).read_all()
    finally:
        os.unlink(path)
