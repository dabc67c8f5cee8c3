"""Files that are there whole or not at all, and what may stand in a JSON file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenrec.errors import InputError


def write_json(
    path: Path, value: Mapping[str, Any] | Sequence[Mapping[str, Any]]
) -> None:
    """Writes `value` and the folders above `path`. No reader sees half a file, and a failed write changes nothing.

    Raises:
      ValueError: a number is not finite, which JSON cannot say.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a text file in UTF-8. No reader sees half of it, and a failed write changes nothing."""
    with atomic_replace(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Where to write a file of any kind, which takes the place of `path` at once if nothing was raised."""
    partial = path.with_name(f".{path.name}.incomplete-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def parse_json(text: str | bytes, what: str, remedy: str) -> Any:
    """The value that a JSON text holds; `what` and `remedy` are for the message.

    Raises:
      InputError: the text is not JSON, not UTF-8, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as error:  # also a UnicodeDecodeError, or a number of thousands of digits
        raise InputError(f"{what} is not JSON: {error}; {remedy}") from error


def read_json(path: Path, what: str, remedy: str) -> Any:
    """`parse_json` of a file; `what` is followed by its path in messages.

    Raises:
      InputError: the file is missing or cannot be read, or `parse_json` refuses its text.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{what} '{path}' cannot be read: {error.strerror}; {remedy}"
        ) from error
    return parse_json(text, f"{what} '{path}'", remedy)
