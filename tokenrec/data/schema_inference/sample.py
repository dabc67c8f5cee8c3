"""Read a bounded sample of a table: parts of the head, the middle and the end.

A small table is read completely. Of a larger text file, blocks at equal distances are
read, so that quantiles of the sample are about those of the file, whether it is sorted
or not. A compressed text file can only be read from its head.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from tokenrec.errors import InputError

# Bytes of text that are read of a table, and the number of blocks they are in.
SAMPLE_BYTES = 16 << 20
BLOCKS = 32
# Rows that are kept of a Parquet table.
SAMPLE_ROWS = 400_000
# Files of a table that are looked into.
MOST_FILES = 8
_BATCH_ROWS = 1 << 16
_COMPRESSED = (".gz", ".zst")
_DELIMITERS = ",\t;|"


@dataclasses.dataclass(frozen=True)
class TableSample:
    """Some rows of a table, in the order of its files.

    Attributes:
      files: the files of the table.
      table: the rows, all columns. Those of text files are strings, null where empty.
      is_text: whether the files are text.
      complete: whether the sample is the whole table.
      rows: number of rows of the table; an estimate unless `complete`.
    """

    files: tuple[Path, ...]
    table: pa.Table
    is_text: bool
    complete: bool
    rows: int

    @property
    def names(self) -> list[str]:
        return list(self.table.column_names)

    def describe(self) -> str:
        """Say how much was looked at, as the end of a sentence."""
        looked = self.table.num_rows
        if self.complete:
            return f"all {looked:,} rows"
        return (
            f"a sample of {looked:,} of about {self.rows:,} rows, from the head, the "
            "middle and the end"
        )


def read_sample(
    files: Sequence[Path], *, sample_bytes: int = SAMPLE_BYTES, blocks: int = BLOCKS
) -> TableSample:
    """Read a sample of a table.

    Args:
      files: text or Parquet files of one table, in order.
      sample_bytes: the most bytes of text to read.
      blocks: number of blocks of a long text file.

    Raises:
      InputError: a file cannot be read, has no rows, or has other columns than the
        first one.
    """
    files = [Path(file) for file in files]
    chosen = _spread(files, MOST_FILES)
    is_text = not files[0].name.lower().endswith(".parquet")
    parts: list[pa.Table] = []
    read_share: list[float] = []
    for file in chosen:
        try:
            table, share = (
                _read_text(file, sample_bytes // len(chosen), blocks)
                if is_text
                else _read_parquet(file, SAMPLE_ROWS // len(chosen))
            )
        except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
            raise InputError(
                f"{file}: cannot be read as a table: {error}; name a text file with a "
                "header (.csv, .tsv, .txt, .inter) or a .parquet file"
            ) from error
        if parts and table.column_names != parts[0].column_names:
            raise InputError(
                f"{file}: has the columns {', '.join(table.column_names)}, but "
                f"{chosen[0]} has {', '.join(parts[0].column_names)}; the files of a "
                "log need the same columns"
            )
        parts.append(table)
        read_share.append(share)
    table = pa.concat_tables(parts, promote_options="permissive")
    if not table.num_rows:
        raise InputError(
            f"{files[0]}: has no rows under its header; check the file, or name another"
        )
    share = float(np.mean(read_share)) * len(chosen) / len(files)
    return TableSample(
        files=tuple(files),
        table=table,
        is_text=is_text,
        complete=share >= 1,
        rows=table.num_rows if share >= 1 else round(table.num_rows / share),
    )


def find_delimiter(header: str) -> str:
    """Find what separates the names in a header: the most frequent of `,`, tab, ; and |.

    >>> find_delimiter("user_id:token\\titem_id:token")
    '\\t'
    """
    return max(_DELIMITERS, key=header.count)


def _spread[T](values: Sequence[T], most: int) -> list[T]:
    """At most `most` values at equal distances, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    places = np.linspace(0, len(values) - 1, most).round().astype(int)
    return [values[place] for place in places]


def _read_text(file: Path, budget: int, blocks: int) -> tuple[pa.Table, float]:
    """Read blocks of a text file; return the rows and the share of the file read."""
    size = file.stat().st_size
    if file.suffix.lower() in _COMPRESSED:
        with pa.input_stream(str(file), compression="detect") as stream:
            head = stream.read(budget)
            more = bool(stream.read(1))
        # Of what is behind the head, only the compressed size is known.
        return _parse(head, cut=more), (0.5 if more else 1.0)
    with file.open("rb") as stream:
        if size <= budget:
            return _parse(stream.read()), 1.0
        length = budget // blocks
        header = stream.readline()
        tables = []
        for place in np.linspace(len(header), size - length, blocks).astype(int):
            stream.seek(int(place))
            block = stream.read(length)
            if place > len(header):
                # The block begins within a line.
                block = block.partition(b"\n")[2]
            tables.append(_parse(header + block, cut=place + length < size))
    return pa.concat_tables(tables), budget / size


def _parse(text: bytes, cut: bool = False) -> pa.Table:
    """Parse lines under a header; all values are strings.

    Args:
      text: the lines, the header among them.
      cut: drop what is behind the last line break.
    """
    if cut:
        text = text[: text.rfind(b"\n") + 1]
    header, _, rows = text.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
    delimiter = find_delimiter(header.decode())
    names = next(csv.reader([header.decode().rstrip("\r")], delimiter=delimiter), [])
    if not rows.strip():
        return pa.table({name: pa.array([], pa.string()) for name in names})
    return pa.csv.read_csv(
        pa.BufferReader(rows),
        read_options=pa.csv.ReadOptions(column_names=names, block_size=len(rows) + 1),
        parse_options=pa.csv.ParseOptions(
            delimiter=delimiter,
            newlines_in_values=True,
            # A block may begin inside a quoted value; `prepare` reads every line.
            invalid_row_handler=lambda row: "skip",
        ),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )


def _read_parquet(file: Path, most_rows: int) -> tuple[pa.Table, float]:
    """Read rows at equal distances; return them and their share of the file."""
    with pa.parquet.ParquetFile(file) as source:
        rows = source.metadata.num_rows
        groups = _spread(range(source.num_row_groups), MOST_FILES)
        in_groups = sum(source.metadata.row_group(group).num_rows for group in groups)
        kept = min(most_rows / max(in_groups, 1), 1.0)
        batches = [
            batch.slice(0, int(np.ceil(batch.num_rows * kept)))
            for batch in source.iter_batches(_BATCH_ROWS, row_groups=groups)
        ]
        table = pa.Table.from_batches(batches, schema=source.schema_arrow)
    return table, table.num_rows / rows if rows else 1.0
