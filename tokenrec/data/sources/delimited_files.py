"""Find the files of a log: a file, a folder of parts, or a glob."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from tokenrec.errors import InputError


def expand(paths: Iterable[Path]) -> list[Path]:
    """Return the files of paths, those of a folder or a glob in sorted order.

    A folder is read with the folders in it. Names that begin with a dot or an
    underscore are left out: Spark and others write such markers beside the parts.

    Raises:
      InputError: there is no such file, or none in a folder.
    """
    return [file for path in paths for file in _expand(Path(path))]


def _expand(path: Path) -> list[Path]:
    if path.is_file():
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


def _is_marker(name: str) -> bool:
    return name.startswith((".", "_"))


def _files_in(folder: Path) -> list[Path]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(map(_is_marker, file.relative_to(folder).parts))
    )
    if not files:
        raise InputError(
            f"{folder}: is a folder without files to read; check the path (names that "
            "begin with . or _ are left out)"
        )
    return files
