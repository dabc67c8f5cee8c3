"""A journal of events: what was acknowledged survives the end of the process.

Events are appended as frames, and are on disk before `append` returns:

    8 bytes   length of the body, little-endian
    4 bytes   CRC-32 of the body
    4 bytes   CRC-32 of these 12 bytes
    body      number of the frame (8 bytes), then an Arrow IPC stream of the events

A process that is killed while it writes leaves a part of a frame at the end, whose
events nobody was told of: it is cut off. A frame that is wrong anywhere else is damage,
and is refused.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from tokenrec.errors import InputError

_HEAD = struct.Struct("<QII")
_NUMBER = struct.Struct("<Q")
_MAGIC = b"tokenrec events 1\n"


class Journal:
    """A file of events, in the order in which they were accepted.

    Args:
      path: the file; it is made where there is none.

    Attributes:
      number: number of the last frame, 0 before the first.
      cut_bytes: size of an incomplete frame that `read` cut off.

    Raises:
      InputError: another process has the file open.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self.number = 0
        self.cut_bytes = 0
        if not self._path.exists() or self._path.stat().st_size < len(_MAGIC):
            self._begin()
        self._file = self._open()

    def read(self, after: int) -> Iterator[pa.Table]:
        """Yield the events of each frame after a number, and stand at the end.

        Args:
          after: number of the last frame whose events are known already.

        Raises:
          InputError: the file is no journal, is damaged, or begins after later frames.
        """
        file = self._file
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if file.read(len(_MAGIC)) != _MAGIC:
            raise InputError(
                f"journal '{self._path}' is no journal of events; name another file"
            )
        self.number = after
        while (start := file.tell()) < size:
            body = self._body(start, size)
            if body is None:
                self.cut_bytes = size - start
                file.truncate(start)
                break
            (number,) = _NUMBER.unpack_from(body)
            if number <= after:
                continue
            if number != self.number + 1:
                raise InputError(
                    f"journal '{self._path}' goes on with frame {number}, but the state "
                    f"that is opened ends with frame {self.number}; open the state that "
                    "was saved last"
                )
            self.number = number
            with pa.ipc.open_stream(pa.py_buffer(body[_NUMBER.size :])) as reader:
                yield reader.read_all()
        file.seek(0, os.SEEK_END)

    def append(self, table: pa.Table) -> None:
        """Write events to disk.

        Raises:
          OSError: they could not be written; the journal is as it was.
        """
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        body = _NUMBER.pack(self.number + 1) + sink.getvalue().to_pybytes()
        start = self._file.tell()
        try:
            self._file.write(_head(body) + body)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(start)
            self._file.seek(start)
            raise
        self.number += 1

    def begin_anew(self) -> None:
        """Drop all frames, whose events a saved state has."""
        self._begin()
        self._file.close()
        self._file = self._open()
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self) -> BinaryIO:
        """Open the file for this process alone."""
        file = self._path.open("r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise InputError(
                f"journal '{self._path}' is open already ({error.strerror}): each "
                "process needs a journal of its own; name another file, or end the "
                "other process"
            ) from error
        return file

    def _begin(self) -> None:
        """Replace the file by one without frames."""
        partial = self._path.with_name(f".{self._path.name}.incomplete-{os.getpid()}")
        with partial.open("wb") as file:
            file.write(_MAGIC)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)

    def _body(self, start: int, size: int) -> bytes | None:
        """The body of the next frame; None where the file ends within it."""
        head = self._file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None
        length, checksum, of_head = _HEAD.unpack(head)
        if zlib.crc32(head[:-4]) == of_head:
            if start + _HEAD.size + length > size:
                return None
            body = self._file.read(length)
            if zlib.crc32(body) == checksum:
                return body
            # The file may have got its length before its contents.
            if self._file.tell() == size:
                return None
        elif not any(head) and not any(self._file.read()):
            return None
        raise InputError(
            f"journal '{self._path}' is damaged at byte {start}; restore the file, or "
            "move it away to go on from the saved state without its events"
        )


def _head(body: bytes) -> bytes:
    head = struct.pack("<QI", len(body), zlib.crc32(body))
    return head + struct.pack("<I", zlib.crc32(head))
