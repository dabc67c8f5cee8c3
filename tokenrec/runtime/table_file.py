"""Write a Parquet file of tables that are made one after another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tokenrec.runtime.files import atomic_replace
from tokenrec.runtime.paths import make_folder


def write_tables(tables: Iterator[pa.Table], out: Path) -> int:
    """Write tables of one schema as a Parquet file; no table, no file.

    Args:
      tables: the tables, one in memory at a time.
      out: file to write. It appears when it is complete, and a failure leaves an older
        file as it was.

    Returns:
      The number of rows.
    """
    first = next(tables, None)
    if first is None:
        return 0
    make_folder(out.parent)
    rows = 0
    with (
        atomic_replace(out) as partial,
        pq.ParquetWriter(partial, first.schema) as file,
    ):
        for table in itertools.chain([first], tables):
            file.write_table(table)
            rows += table.num_rows
    return rows
