"""Verify the files of a checkpoint by their sizes and SHA-256 checksums.

Orbax renames the folder of a checkpoint when it is complete, so an interrupted save is
never taken for a checkpoint. It has no protection against damage after that: a flipped
bit in a file of weights would be read as a weight. The checksums are written to
`sums.INDEX.json` in the checkpoint's folder, by each process for its share of the files.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenrec.runtime.files import write_json

_CHECKSUM_FILES = "sums.*.json"
# The checksum file of a process, also while that process writes it: processes finish at
# different times, and must see the same list of data files.
_CHECKSUM_NAME = re.compile(r"\.?sums\.\d+\.json(\.incomplete-\d+)?")
QUARANTINE_PREFIX = "damaged-"


def write_checksums(folder: Path, index: int = 0, count: int = 1) -> None:
    """Write the checksums of a checkpoint's files.

    Args:
      folder: folder of the checkpoint, which is complete.
      index: number of this process, which takes every `count`-th file from `index` on.
      count: number of processes that share the files.
    """
    checksums = {
        path.relative_to(folder).as_posix(): _checksum(path)
        for path in _data_files(folder)[index::count]
    }
    write_json(folder / _CHECKSUM_FILES.replace("*", str(index)), checksums)


def find_damage(
    folder: Path, index: int = 0, count: int = 1, max_bytes: float = math.inf
) -> list[str]:
    """Compare the files of a checkpoint with their checksums.

    A checkpoint without checksums has no known damage: its process ended after the
    checkpoint was complete and before the checksums were written.

    Args:
      folder: folder of the checkpoint.
      index: number of this process, which takes every `count`-th file from `index` on.
      count: number of processes that share the files.
      max_bytes: files that were larger are not checked.

    Returns:
      A text for each damaged file.
    """
    expected: dict[str, Any] = {}
    # The files of all processes: a restart may have another number of them.
    for path in sorted(folder.glob(_CHECKSUM_FILES)):
        try:
            expected |= json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            return [f"{path.name}: {error}"]
    checked = sorted(
        (name, checksum)
        for name, checksum in expected.items()
        if checksum["bytes"] <= max_bytes and not _is_checksum_file(Path(name))
    )
    return list(_differences(folder, checked[index::count]))


def quarantine(folder: Path) -> Path:
    """Rename a damaged checkpoint: it is no longer used and can be examined."""
    target = folder.with_name(QUARANTINE_PREFIX + folder.name)
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{QUARANTINE_PREFIX}{folder.name}-{number}")
    return folder.rename(target)


def _differences(folder: Path, expected: Iterable[tuple[str, Any]]) -> Iterator[str]:
    for name, written in expected:
        try:
            current = _checksum(folder / name)
        except OSError as error:
            yield f"{name}: {error.strerror}"
            continue
        # A file that was cut off is the most frequent damage, so it has its own text.
        if current["bytes"] != written["bytes"]:
            yield f"{name}: {current['bytes']:,} bytes, not {written['bytes']:,}"
        elif current != written:
            yield f"{name}: other contents than were written"


def _checksum(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        # The file was read to its end, so the position is its size.
        return {"bytes": file.tell(), "sha256": digest}


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if not _is_checksum_file(path) and path.is_file()
    )


def _is_checksum_file(path: Path) -> bool:
    return _CHECKSUM_NAME.fullmatch(path.name) is not None
