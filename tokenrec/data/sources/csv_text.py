"""Open a CSV file as a stream of UTF-8 text, whatever its compression and encoding.

What a file is, is told by its first bytes and not by its name: exports are often gzip
or Parquet under the name `.csv`. `CsvText` counts quotes and lines as they pass, from
which `tabular.py` decides whether quoting has to be looked at closely.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from tokenrec.errors import InputError, suggest
from tokenrec.runtime.files import RetryingFile

FILE_REMEDY = "check the path and that the file is whole"
# Separators that are looked for, the likeliest first.
# Of the files of RecBole that have users or items.
ATOMIC_SUFFIXES = (".inter", ".user", ".item")
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}

_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\x04\x22\x4d\x18": "lz4",
}
_SUFFIXES = {"gzip": ".gz", "zstd": ".zst", "bz2": ".bz2", "lz4": ".lz4"}
_MARKS = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
# A header must end within these bytes.
_HEAD_BYTES = 1 << 20
# RecBole writes the type of a column into its name.
_TYPED_NAME = re.compile(r"(.*):(token|token_seq|float|float_seq)")


def is_parquet(path: Path) -> bool:
    """Whether the first bytes of a file are those of Parquet."""
    return _first_bytes(path, 4) == b"PAR1"


def compression(path: Path) -> str | None:
    """Return the name of a file's compression, by its first bytes."""
    first = _first_bytes(path, 4)
    return next(
        (name for key, name in _COMPRESSIONS.items() if first[:4].startswith(key)), None
    )


def _first_bytes(path: Path, count: int) -> bytes:
    with RetryingFile(path) as file:
        return file.read(count) or b""


class CsvText:
    """A CSV file that is read as UTF-8 bytes, decompressed.

    Attributes:
      quotes: number of quote characters that were read.
      line_feeds: number of line feeds that were read.
      has_escapes: a backslash stood before a quote.
      encoding: encoding of the file.
    """

    closed = False

    def __init__(self, path: Path, stream: Any) -> None:
        self._path = path
        self._stream = stream
        self._pending = b""
        self._decoder: codecs.IncrementalDecoder | None = None
        self.quotes = 0
        self.line_feeds = 0
        self.has_escapes = False
        self.encoding = "utf-8"
        first = stream.read(_HEAD_BYTES)
        if first[:2] in _MARKS:
            self.encoding = _MARKS[first[:2]]
            self._decoder = codecs.getincrementaldecoder(self.encoding)()
            first = first[2:]
        self._pending = self._decode(first).removeprefix(codecs.BOM_UTF8)

    def head(self) -> bytes:
        """Return the first bytes, which `read` returns again."""
        return self._pending

    def skip(self, count: int) -> None:
        """Leave out bytes of the head."""
        self._pending = self._pending[count:]

    def read(self, count: int = -1) -> bytes:
        """Read at most `count` bytes; none at the end."""
        # Decoded bytes may be more than were read.
        block = self._pending or self._decode(self._stream.read(count))
        self._pending = b""
        if 0 <= count < len(block):
            block, self._pending = block[:count], block[count:]
        self.quotes += block.count(b'"')
        self.line_feeds += block.count(b"\n")
        self.has_escapes |= b'\\"' in block
        return block

    def _decode(self, block: bytes) -> bytes:
        if self._decoder is None:
            return block
        # The decoder keeps the first half of a character; only the end of the file may
        # give an empty block.
        try:
            text = self._decoder.decode(block, final=not block)
            while block and not text:
                block = self._stream.read(len(block))
                text = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self._path}: begins as {self.encoding}, but "
                f"{error.object[error.start : error.end + 6]!r} is not; save the file "
                "with UTF-8 encoding"
            ) from error
        return text.encode("utf-8", "surrogatepass")

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """Do nothing: `open_text` closes the file."""


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[CsvText]:
    """Open a CSV file.

    Raises:
      InputError: the file is an archive or a workbook.
      OSError: it cannot be read.
    """
    if _first_bytes(path, 4) == b"PK\x03\x04":
        raise InputError(
            f"{path}: is a zip archive or a workbook, not CSV; unpack it, or save it as "
            "CSV or Parquet"
        )
    with (
        RetryingFile(path) as source,
        pa.input_stream(source, compression=compression(path)) as stream,
    ):
        yield CsvText(path, stream)


@dataclasses.dataclass(frozen=True)
class CsvHeader:
    """The first record of a CSV file.

    Attributes:
      fields: names of the columns.
      delimiter: what separates fields.
      length: bytes of the header, with the blank lines before it.
      lines: lines of the header.
      notes: what is unusual about the file, for the user.
    """

    fields: list[str]
    delimiter: str
    length: int
    lines: int
    notes: tuple[str, ...] = ()

    def find(self, path: Path, names: Sequence[str]) -> list[int]:
        """Return the position of each named column.

        Raises:
          InputError: a column is missing, or there are several.
        """
        return [self._find(path, name) for name in names]

    def _find(self, path: Path, name: str) -> int:
        found = matching(name, self.fields)
        if len(found) > 1:
            repeated = ", ".join(f"'{self.fields[position]}'" for position in found)
            raise InputError(
                f"{path}: has {len(found)} columns '{name}' ({repeated}); rename all "
                "but one"
            )
        if found:
            return found[0]
        others = [
            DELIMITERS[other]
            for other in DELIMITERS
            if len(self.fields) == 1 and other in self.fields[0]
        ]
        hint = nearest_column(path, name, self.fields)
        if others:
            hint = (
                f"; its header is one field, {self.fields[0]!r}: it is separated by "
                f"{others[0]} and not by {DELIMITERS.get(self.delimiter, self.delimiter)}"
            )
        raise InputError(f"{path}: has no column '{name}'{hint}")


def matching(name: str, fields: Sequence[str]) -> list[int]:
    """Return where a column is: under its name, else under `NAME:TYPE` of RecBole."""
    exact = [i for i, field in enumerate(fields) if field == name]
    if exact:
        return exact
    typed = [_TYPED_NAME.fullmatch(field) for field in fields]
    return [i for i, match in enumerate(typed) if match and match[1] == name]


def nearest_column(path: Path, name: str, fields: Sequence[str]) -> str:
    """Suggest a column; a difference of case or of spaces alone comes first."""
    for folder in path.parts[:-1]:
        if folder.startswith(f"{name}="):
            return (
                f"; it is in the name of the folder '{folder}', which is not read; "
                "write it into the files"
            )
    for field in fields:
        if field.strip().lower() == name.strip().lower():
            return f"; did you mean '{field}'?"
    return suggest(name, fields)


def read_header(
    path: Path, text: CsvText, names: Sequence[str], delimiter: str | None
) -> CsvHeader:
    """Read the header from the head of a file.

    Args:
      path: the file, for messages.
      text: the file, at its start.
      names: columns that are wanted; they decide between separators.
      delimiter: what separates fields; None to find out.

    Raises:
      InputError: the file is empty, or its first line is not a header.
    """
    head = text.head()
    if b"\0" in head[:4096]:
        raise InputError(
            f"{path}, line 1: {head[:20]!r} has NUL bytes: it is not UTF-8 text, but "
            "UTF-16 without a byte order mark, or no text at all; save the file with "
            "UTF-8 encoding"
        )
    choices = list(DELIMITERS) if delimiter is None else [delimiter]
    headers = [_parse_header(path, head, choice) for choice in choices]
    if not headers[0].fields:
        raise InputError(
            f"{path}: the file is empty; line 1 must be a header with "
            f"{', '.join(names)}; {FILE_REMEDY}"
        )
    best = max(
        headers,
        key=lambda header: (
            sum(bool(matching(name, header.fields)) for name in names),
            # Without a known name, the separator that occurs most.
            len(header.fields),
        ),
    )
    notes = []
    if delimiter is None and best.delimiter != ",":
        notes.append(f"is separated by {DELIMITERS[best.delimiter]}")
    if text.encoding != "utf-8":
        notes.append(f"is read as {text.encoding}")
    packed = compression(path)
    if packed is not None and path.suffix.lower() != _SUFFIXES[packed]:
        notes.append(
            f"is {packed}, though its name does not end in {_SUFFIXES[packed]}"
        )
    return dataclasses.replace(best, notes=tuple(notes))


def _parse_header(path: Path, head: bytes, delimiter: str) -> CsvHeader:
    """Parse the first record that is not blank; one without fields if there is none."""
    lines = io.StringIO(head.decode("utf-8", "surrogateescape"), newline="")
    read: list[str] = []

    def counted() -> Iterator[str]:
        for line in lines:
            read.append(line)
            yield line

    fields: list[str] = []
    try:
        for fields in csv.reader(counted(), delimiter=delimiter):
            if fields:
                break
    # A value of 128 KiB.
    except csv.Error as error:
        raise InputError(_no_header(path, str(error))) from error
    consumed = "".join(read).encode("utf-8", "surrogateescape")
    if len(consumed) >= _HEAD_BYTES:
        raise InputError(_no_header(path, f"it is longer than {_HEAD_BYTES >> 20} MiB"))
    if any("\udc80" <= letter <= "\udcff" for name in fields for letter in name):
        value = consumed[:40]
        raise InputError(
            f"{path}, line 1: {value!r} is not UTF-8; save the file with UTF-8 encoding"
        )
    return CsvHeader(fields, delimiter, len(consumed), len(read))


def _no_header(path: Path, reason: str) -> str:
    return (
        f"{path}, line 1: is not a header: {reason}; is this a CSV file? {FILE_REMEDY}"
    )
