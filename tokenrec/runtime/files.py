"""Write files atomically, and read and write JSON.

A file that is written here is replaced in one step (`rename` in the same folder), so a
reader or a run that was killed sees the old contents or the new ones, never a part. In an
object store, whose writes replace an object at once, it is written locally and uploaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenrec.errors import InputError
from tokenrec.runtime.paths import filesystem, is_remote, make_folder


def write_json(
    path: Path, value: Mapping[str, Any] | Sequence[Mapping[str, Any]]
) -> None:
    """Write `value` as JSON; missing parent folders are created.

    Raises:
      ValueError: a number is NaN or infinite, which JSON cannot represent.
    """
    make_folder(path.parent)
    write_text_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file in UTF-8; if the write fails, `path` keeps its contents."""
    with atomic_replace(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends.

    If the block raises, `path` keeps its contents and the temporary file is deleted. If
    the block writes no file, `path` keeps its contents too. For a path in an object
    store the temporary file is local, and is uploaded when the block ends.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="tokenrec-") as folder:
            local = Path(folder) / path.name
            yield local
            if local.exists():
                # The object appears when the upload is complete.
                filesystem(path).put_file(os.fspath(local), os.fspath(path))
        return
    # The process id keeps two processes that write the same file apart.
    partial = path.with_name(f".{path.name}.incomplete-{os.getpid()}")
    try:
        yield partial
        if partial.exists():
            _flush_to_disk(partial)
            # Atomic within one file system, which is why the file is beside its target.
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    # Without this a power failure after the rename can leave an empty file.
    with path.open("rb") as file:
        os.fsync(file.fileno())


def parse_json(text: str | bytes, what: str, remedy: str) -> Any:
    """Parse JSON.

    Args:
      text: the JSON text.
      what: name of the text for error messages.
      remedy: what the user can do, for error messages.

    Returns:
      The parsed value.

    Raises:
      InputError: the text is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text)
    # ValueError covers UnicodeDecodeError, and numbers of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not JSON: {error}; {remedy}") from error


def read_json(path: Path, what: str, remedy: str) -> Any:
    """Read and parse a JSON file.

    Args:
      path: the file.
      what: name of the file for error messages; its path is added.
      remedy: what the user can do, for error messages.

    Returns:
      The parsed value.

    Raises:
      InputError: the file is missing, cannot be read, or is not JSON.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{what} '{path}' cannot be read: {error.strerror or error}; {remedy}"
        ) from error
    return parse_json(text, f"{what} '{path}'", remedy)
