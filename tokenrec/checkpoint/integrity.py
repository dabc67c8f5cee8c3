"""Verify the files of a checkpoint by their sizes and SHA-256 checksums.

Orbax gives the folder of a checkpoint its name when it is complete, so an interrupted
save is never taken for a checkpoint. It has no protection against damage after that: a
flipped bit in a file of weights would be read as a weight. So two kinds of files are
written into the folder when it is complete:

- `sums.json`, by the first process: the names and sizes of all files. There is one
  listing, so that the processes share the work without gaps.
- `sums.INDEX.json`, by each process: the checksums of its share of these files.

Each of them holds a digest of itself, and all of them are replaced atomically. A
checkpoint is *verified* when they are all there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tokenrec.checkpoint.object_storage import uncommit
from tokenrec.errors import StorageError
from tokenrec.runtime.files import is_file, write_json
from tokenrec.runtime.paths import (
    file_size,
    is_remote,
    list_files,
    list_names,
    move_folder,
)
from tokenrec.runtime.retry import retry

LISTING = "sums.json"
# Written after the checkpoint, when a later evaluation changes its progress.
PROGRESS_FILE = "progress.json"
QUARANTINE_PREFIX = "damaged-"
_CHECKSUM_FILES = "sums.*.json"
_DIGEST = "digest"
# A file costs about as much time as this many bytes of it.
_FILE_OVERHEAD = 1 << 20
# Other hosts see a new file of a network disk only after some time.
_LISTING_SECONDS = 600.0
_POLL_SECONDS = 0.05


def write_checksums(folder: Path, index: int = 0, count: int = 1) -> None:
    """Write the checksums of a checkpoint's files, and the files to the disk.

    Every process of the run calls it; they may do so at different times.

    Args:
      folder: folder of the checkpoint, which is complete.
      index: number of this process.
      count: number of processes that share the files.

    Raises:
      StorageError: a file cannot be read or written, or the first process has not
        written the listing.
    """
    if index == 0:
        files = {name: _size(folder / name) for name in _data_files(folder)}
        write_signed_json(folder / LISTING, {"files": files, "processes": count})
    else:
        files = _wait_for_listing(folder)
    checksums = {
        name: _checksum(folder / name, flush=True)
        for name in _share(files, index, count)
    }
    write_signed_json(folder / f"sums.{index}.json", checksums)


def is_verified(folder: Path) -> bool:
    """Whether all checksums are there.

    They are not if a process ended after the checkpoint was complete and before it had
    written its checksums.
    """
    try:
        listing = _read_listing(folder)
    except FileNotFoundError:
        # Those of earlier versions have no listing, and no digest of themselves.
        parts = [_read_object(path) for path in _checksum_files(folder)]
        return bool(parts) and not any(_DIGEST in part for part in parts)
    return all(
        is_file(folder / f"sums.{index}.json") for index in range(listing["processes"])
    )


def remove_checksums(folder: Path) -> None:
    """Delete the checksums of a checkpoint that is not verified."""
    for path in [*_checksum_files(folder), folder / LISTING]:
        path.unlink(missing_ok=True)


def find_damage(folder: Path, index: int = 0, count: int = 1) -> list[str]:
    """Compare the files of a checkpoint with their checksums.

    A file without a checksum has no known damage.

    Args:
      folder: folder of the checkpoint.
      index: number of this process.
      count: number of processes that share the files.

    Returns:
      A text for each damaged file: one that is gone, or has another size or digest.

    Raises:
      StorageError: a file cannot be read now, which says nothing about its contents.
    """
    try:
        expected = _read_all_checksums(folder)
        with contextlib.suppress(FileNotFoundError):
            read_signed_json(folder / PROGRESS_FILE)
    except _DamagedError as damage:
        # The other files cannot be trusted either: nothing says what they should be.
        return [str(damage)]
    sizes = {name: checksum["bytes"] for name, checksum in expected.items()}
    own = {name: expected[name] for name in _share(sizes, index, count)}
    return list(_differences(folder, own))


def quarantine(folder: Path) -> Path:
    """Rename a damaged checkpoint: it is no longer used and can be examined."""
    target = folder.with_name(QUARANTINE_PREFIX + folder.name)
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{QUARANTINE_PREFIX}{folder.name}-{number}")
    if is_remote(folder):
        # Half of a copy, or of what is left, must not be taken for a checkpoint.
        uncommit(folder)
    return move_folder(folder, target)


def write_signed_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with a digest of itself.

    Raises:
      StorageError: the storage is at fault, again and again.
    """
    signed = dict(value) | {_DIGEST: _digest(value)}
    write_json(path, signed)


def read_signed_json(path: Path) -> dict[str, Any]:
    """Read what `write_signed_json` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged; the message names it.
      StorageError: it cannot be read now.
    """
    value = _read_object(path)
    if value.pop(_DIGEST, None) != _digest(value):
        raise _DamagedError(f"{path.name}: other contents than were written")
    return value


class _DamagedError(ValueError):
    """A file of checksums that is not what was written."""


def _read_object(path: Path) -> dict[str, Any]:
    text = retry(path.read_bytes, path)
    try:
        value = json.loads(text)
    # ValueError covers text that is not UTF-8, RecursionError one that is nested deeply.
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"{path.name}: not JSON") from error
    if not isinstance(value, dict):
        raise _DamagedError(f"{path.name}: holds a {type(value).__name__}, no object")
    return value


def _read_listing(folder: Path) -> dict[str, Any]:
    return read_signed_json(folder / LISTING)


def _wait_for_listing(folder: Path) -> dict[str, int]:
    deadline = time.monotonic() + _LISTING_SECONDS
    while True:
        try:
            return dict(_read_listing(folder)["files"])
        except FileNotFoundError as error:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"'{folder / LISTING}' of process 0 did not appear within "
                    f"{_LISTING_SECONDS:g} s; rerun the command of all processes, with "
                    "one --workdir that they share"
                ) from error
            time.sleep(_POLL_SECONDS)


def _read_all_checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the checksums of all processes; a restart may have another number of them.

    Raises:
      _DamagedError: a file is damaged, or lists other files than the listing.
    """
    checksums: dict[str, dict[str, Any]] = {}
    for path in _checksum_files(folder):
        value = _read_object(path)
        # Files of earlier versions have no digest, and may list the temporary file of
        # another process.
        if _DIGEST in value and value.pop(_DIGEST) != _digest(value):
            raise _DamagedError(f"{path.name}: other contents than were written")
        for name, checksum in value.items():
            if not _is_checksum(checksum):
                raise _DamagedError(f"{path.name}: '{name}' has no size and digest")
        checksums |= value
    with contextlib.suppress(FileNotFoundError):
        listed = _read_listing(folder)["files"]
        if is_verified(folder) and checksums.keys() != listed.keys():
            raise _DamagedError(f"{LISTING}: lists other files than have a checksum")
    return {
        name: checksum
        for name, checksum in checksums.items()
        if not Path(name).name.startswith(".")
    }


def _share(files: Mapping[str, int], index: int, count: int) -> list[str]:
    """Names of the files that process `index` reads; `files` maps names to bytes.

    All processes compute the same division: the largest file goes to the process that
    has the least to do.
    """
    load = [0] * count
    own = []
    for name, size in sorted(files.items(), key=lambda item: (-item[1], item[0])):
        process = load.index(min(load))
        load[process] += size + _FILE_OVERHEAD
        if process == index:
            own.append(name)
    return own


def _differences(
    folder: Path, expected: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    for name, written in expected.items():
        try:
            current = _checksum(folder / name)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            yield f"{name}: {error.strerror or error}"
            continue
        # A file that was cut off is the most frequent damage, so it has its own text.
        if current["bytes"] != written["bytes"]:
            yield f"{name}: {current['bytes']:,} bytes, not {written['bytes']:,}"
        elif current != written:
            yield f"{name}: other contents than were written"


def _checksum(path: Path, *, flush: bool = False) -> dict[str, int | str]:
    """Size and SHA-256 of a file; `flush` makes sure that it is on the disk."""

    def read() -> dict[str, int | str]:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if flush and not is_remote(path):
                # Not all writers of Orbax do it: a power failure could empty the file.
                os.fsync(file.fileno())
            # The file was read to its end, so the position is its size.
            return {"bytes": file.tell(), "sha256": digest}

    return retry(read, path)


def _size(path: Path) -> int:
    return retry(lambda: file_size(path), path)


def _data_files(folder: Path) -> list[str]:
    """Names of a checkpoint's files, without ours and without temporary ones."""
    return sorted(
        name
        for name in list_files(folder)
        if not Path(name).name.startswith(".") and not _is_ours(Path(name))
    )


def _checksum_files(folder: Path) -> list[Path]:
    """The checksum files of all processes."""
    return [
        folder / name for name in list_names(folder) if fnmatch(name, _CHECKSUM_FILES)
    ]


def _is_ours(path: Path) -> bool:
    return path.name in (LISTING, PROGRESS_FILE) or path.match(_CHECKSUM_FILES)


def _is_checksum(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"bytes", "sha256"}
        and isinstance(value["bytes"], int)
        and isinstance(value["sha256"], str)
    )


def _digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON value and not of its text, so that layout does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
