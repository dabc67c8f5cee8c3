"""Read a bounded sample of a table: parts of the head, the middle and the end.

A small table is read completely. Of a larger text file, blocks at equal distances are
read, so that quantiles of the sample are about those of the file, whether it is sorted
or not. A compressed file has to be decompressed to its end for that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from tokenrec.data.sources.csv_text import (
    CsvHeader,
    CsvText,
    compression,
    is_parquet,
    open_text,
    read_header,
)
from tokenrec.data.sources.delimited_files import expand
from tokenrec.errors import InputError

# Bytes of text that are read of a table, and the number of blocks they are in.
SAMPLE_BYTES = 16 << 20
BLOCKS = 32
# Rows that are kept of a Parquet table.
SAMPLE_ROWS = 400_000
# Files of a table that are looked into.
MOST_FILES = 8
_BATCH_ROWS = 1 << 16
_PARQUET_BATCHES = 256


@dataclasses.dataclass(frozen=True)
class TableSample:
    """Some rows of a table, in the order of its files.

    Attributes:
      paths: paths of the table, as they were given.
      table: the rows, all columns. Those of text files are strings, null where empty.
      is_text: whether the files are text.
      complete: whether the sample is the whole table.
      rows: number of rows of the table; an estimate unless `complete`.
    """

    paths: tuple[Path, ...]
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
        return f"{looked:,} of about {self.rows:,} rows, from all parts of the files"


def read_sample(
    paths: Sequence[Path], *, sample_bytes: int = SAMPLE_BYTES, blocks: int = BLOCKS
) -> TableSample:
    """Read a sample of a table.

    Args:
      paths: text or Parquet files of one table, or folders or globs of them.
      sample_bytes: the most bytes of text to read.
      blocks: number of blocks of a long text file.

    Raises:
      InputError: a file cannot be read, has no rows, or has other columns than the
        first one.
    """
    files = expand(paths)
    chosen = _spread(files, MOST_FILES)
    is_text = not is_parquet(files[0])
    parts: list[pa.Table] = []
    read_share: list[float] = []
    for file in chosen:
        try:
            table, share = (
                _read_text(file, sample_bytes // len(chosen), blocks)
                if is_text
                else _read_parquet(file, SAMPLE_ROWS // len(chosen))
            )
        except (OSError, pa.ArrowException) as error:
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
        paths=tuple(map(Path, paths)),
        table=table,
        is_text=is_text,
        complete=share >= 1,
        rows=table.num_rows if share >= 1 else round(table.num_rows / share),
    )


def _spread[T](values: Sequence[T], most: int) -> list[T]:
    """At most `most` values at equal distances, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    places = np.linspace(0, len(values) - 1, most).round().astype(int)
    return [values[place] for place in places]


def _read_text(file: Path, budget: int, blocks: int) -> tuple[pa.Table, float]:
    """Read blocks of a text file; return the rows and the share of the file read."""
    with open_text(file) as text:
        header = read_header(file, text, (), None)
        _refuse_values_as_names(file, header.fields)
        text.skip(header.length)
        head = _read_up_to(text, budget)
        rest = text.read(1)
        if not rest:
            return _parse(head, header), 1.0
        if compression(file) is not None or text.encoding != "utf-8":
            return _sample_stream(text, head + rest, header, budget // blocks)
    size = file.stat().st_size
    length = budget // blocks
    tables = []
    with file.open("rb") as stream:
        for place in np.linspace(header.length, size - length, blocks).astype(int):
            stream.seek(int(place))
            block = stream.read(length)
            if place > header.length:
                # The block begins within a line.
                block = block.partition(b"\n")[2]
            tables.append(_parse(block, header, cut=place + length < size))
    return pa.concat_tables(tables), budget / size


def _refuse_values_as_names(file: Path, names: Sequence[str]) -> None:
    """Refuse a header that is a row: half of its fields are numbers."""
    numbers = [name for name in names if re.fullmatch(r"-?\d+(\.\d+)?", name)]
    if 2 * len(numbers) >= len(names):
        raise InputError(
            f"{file}, line 1: {', '.join(names[:6])} looks like a row and not like a "
            "header; write a line with the names of the columns above it"
        )


def _sample_stream(
    text: CsvText, head: bytes, header: CsvHeader, length: int
) -> tuple[pa.Table, float]:
    """Sample a file that can only be read from its head to its end.

    Args:
      text: the file, behind `head`.
      head: what was read of it.
      header: names and separator.
      length: bytes of a block.
    """
    blocks = [head[i : i + length] for i in range(0, len(head), length)]
    blocks[-1] += _read_up_to(text, length - len(blocks[-1]))
    kept = dict(enumerate(blocks))
    most, stride, count = len(blocks), 1, len(blocks)
    while block := _read_up_to(text, length):
        # Every block at first; then every second, fourth, ... of them.
        if count % stride == 0:
            kept[count] = block
        count += 1
        if len(kept) > most:
            stride *= 2
            kept = {i: part for i, part in kept.items() if i % stride == 0}
    tables = []
    for i, block in kept.items():
        # A block but the first begins within a line, and one but the last ends there.
        whole = block.partition(b"\n")[2] if i else block
        tables.append(_parse(whole, header, cut=i < count - 1))
    return pa.concat_tables(tables), len(kept) / count


def _read_up_to(text: CsvText, count: int) -> bytes:
    """Read `count` bytes, or all there are."""
    parts: list[bytes] = []
    while count > 0 and (block := text.read(count)):
        parts.append(block)
        count -= len(block)
    return b"".join(parts)


def _parse(rows: bytes, header: CsvHeader, cut: bool = False) -> pa.Table:
    """Parse lines without a header; all values are strings.

    Args:
      rows: the lines.
      header: names and separator.
      cut: drop what is behind the last line break.
    """
    if cut:
        rows = rows[: rows.rfind(b"\n") + 1]
    if not rows.strip():
        return pa.table({name: pa.array([], pa.string()) for name in header.fields})
    return pa.csv.read_csv(
        pa.BufferReader(rows),
        read_options=pa.csv.ReadOptions(
            column_names=header.fields, block_size=len(rows) + 1
        ),
        parse_options=pa.csv.ParseOptions(
            delimiter=header.delimiter,
            newlines_in_values=True,
            # A block may begin inside a quoted value; `prepare` reads every line.
            invalid_row_handler=lambda row: "skip",
        ),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(header.fields, pa.string()),
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
        # Many short batches, of each of which some rows are kept.
        size = min(max(in_groups // _PARQUET_BATCHES, 1), _BATCH_ROWS)
        batches = [
            batch.slice(0, int(np.ceil(batch.num_rows * kept)))
            for batch in source.iter_batches(size, row_groups=groups)
        ]
        table = pa.Table.from_batches(batches, schema=source.schema_arrow)
    return table, table.num_rows / rows if rows else 1.0
