"""Find the files of a log: a file, a folder of parts, or a glob."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from tokenrec.errors import InputError
from tokenrec.runtime.files import is_file, reading_error


def expand(paths: Iterable[Path] | Path | str | None) -> list[Path]:
    """Return the files of paths or of one, those of a folder or a glob in sorted order.

    A folder is read with the folders in it. Names that begin with a dot or an
    underscore are left out: Spark and others write such markers beside the parts.

    Raises:
      InputError: there is no such file, or none in a folder.
    """
    if isinstance(paths, (Path, str)):
        paths = [Path(paths)]
    return [file for path in paths or () for file in _expand(Path(path))]


def _expand(path: Path) -> list[Path]:
    if is_file(path):
        return [path]
    if path.is_dir():
        return _files_in(path)
    if path.exists():
        # A pipe can be read once, but a file is read several times.
        raise InputError(f"{path}: is not a regular file; write it to one")
    if not glob.has_magic(str(path)):
        raise InputError(f"{path}: no such file; check the path")
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [
        file
        for match in found
        for file in (_files_in(match) if match.is_dir() else [match])
        # A pattern may ask for such names.
        if not _is_marker(file.name) or _is_marker(path.name)
    ]
    if not files:
        raise InputError(f"{path}: matches no file; check the pattern")
    # With `**` a folder and the files in it match.
    return list(dict.fromkeys(files))


def _fail(error: OSError) -> None:
    raise error


def _is_marker(name: str) -> bool:
    return name.startswith((".", "_"))


def _files_in(folder: Path) -> list[Path]:
    files: list[Path] = []
    seen: set[str] = set()
    try:
        # `rglob` would leave out folders that it may not read, and links to folders.
        for root, folders, names in os.walk(folder, onerror=_fail, followlinks=True):
            # A link may lead to a folder that was read, or above.
            if (real := os.path.realpath(root)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if not _is_marker(name)]
            files += [Path(root, name) for name in names if not _is_marker(name)]
    except OSError as error:
        remedy = "check its permissions"
        raise reading_error(error, folder, "folder", remedy) from error
    files.sort()
    if not files:
        raise InputError(
            f"{folder}: is a folder without files to read; check the path (names that "
            "begin with . or _ are left out)"
        )
    return files
