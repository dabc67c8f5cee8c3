"""Paths of local folders and of object stores, `gs://BUCKET/...` and `s3://BUCKET/...`.

`as_path` makes a path of what the user wrote. That of an object store is an
`etils.epath.Path`, which has the interface of `pathlib.Path` and reads and writes through
fsspec. An object store is no file system, and four things differ there:

- A write replaces an object at once, so no temporary file is needed (files.py).
- Nothing can be appended to: logs are written locally and uploaded (log_mirror.py).
- Folders do not exist and cannot be renamed; `move_folder` copies and deletes.
- Libraries in C++ cannot open an object; `local_copy` (local_copy.py) fetches it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

from tokenrec.errors import InputError
from tokenrec.runtime.retry import retry


class _Store(NamedTuple):
    """A kind of object store.

    Attributes:
      package: the fsspec package that reaches it.
      extra: the extra of tokenrec that installs the package.
    """

    package: str
    extra: str


_STORES = {"gs": _Store("gcsfs", "gcs"), "s3": _Store("s3fs", "s3")}
# `gs:/bucket` too: `pathlib` writes it so, and nobody means a local folder "gs:".
_URL = re.compile(
    rf"(?P<scheme>{'|'.join(_STORES)}|[A-Za-z][A-Za-z0-9+.-]*(?=://)):(?P<slashes>/*)"
)


def as_path(text: str | os.PathLike[str]) -> Path:
    """Make a path of what a user wrote.

    `pathlib.Path("gs://bucket/run")` is the local folder `gs:/bucket/run`, so every
    path that may lie in an object store comes from here.

    Args:
      text: a local path, `gs://BUCKET/...` or `s3://BUCKET/...`.

    Returns:
      A `pathlib.Path`, or an `epath.Path`, which has the same interface.

    Raises:
      InputError: another kind of URL, or the package of its object store is missing.
    """
    path = os.fspath(text)
    match = _URL.match(path)
    if match is None:
        return Path(path)
    scheme = match["scheme"]
    if scheme not in _STORES:
        raise InputError(
            f"'{path}' is a URL of '{scheme}'; give a local path, gs://BUCKET/... or "
            "s3://BUCKET/..."
        )
    if match["slashes"] != "//" or match.end() == len(path):
        raise InputError(f"'{path}' names no bucket; write {scheme}://BUCKET/FOLDER")
    _prepare_store(scheme)
    from etils import epath

    return cast(Path, epath.Path(path))


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in an object store."""
    return _scheme(path) in _STORES


def absolute(path: str | os.PathLike[str]) -> Path:
    """The path from the root; that of an object store begins there already."""
    path = as_path(path)
    return path if is_remote(path) else path.absolute()


def local_path(text: str | os.PathLike[str], name: str) -> Path:
    """Make a path where only local ones will do.

    Args:
      text: the path.
      name: flag or argument of the path, for the message.

    Raises:
      InputError: the path is a URL.
    """
    path = os.fspath(text)
    if _URL.match(path):
        raise InputError(
            f"{name}='{path}' must be a local path here; use a local one, and copy it "
            "from or to the object store (docs/guides/object_stores.md)"
        )
    return Path(path)


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    An object store needs no folder, but the bucket must exist: it is not made, for its
    name may be misspelt.

    Raises:
      OSError: the folder cannot be made, or the bucket does not exist.
    """
    if is_remote(path):
        _check_bucket(f"{_scheme(path)}://{object_key(path).partition('/')[0]}")
    else:
        path.mkdir(parents=True, exist_ok=True)


def list_files(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it and sorted.

    Empty if there is no such folder.

    Raises:
      StorageError: the storage is at fault, again and again.
    """
    return retry(lambda: _list_files(folder), folder)


def list_names(folder: Path) -> list[str]:
    """Names of the files and folders in a folder, sorted; empty without the folder.

    `Path.glob` hides all errors, so that a folder that cannot be listed now would look
    empty: a run without checkpoints, which begins again.

    Raises:
      StorageError: the storage is at fault, again and again.
    """

    def names() -> list[str]:
        if is_remote(folder):
            return sorted(path.name for path in folder.glob("*"))
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries)
        return []

    return retry(names, folder)


def _list_files(folder: Path) -> list[str]:
    if not is_remote(folder):
        return sorted(
            (Path(root) / name).relative_to(folder).as_posix()
            for root, _, names in os.walk(folder, onerror=_raise_unless_missing)
            for name in names
        )
    prefix = object_key(folder) + "/"
    return sorted(
        name.removeprefix(prefix)
        for name in filesystem(folder).find(os.fspath(folder))
        # Consoles of object stores make empty objects that stand for folders.
        if name.startswith(prefix) and not name.endswith("/")
    )


def _raise_unless_missing(error: OSError) -> None:
    # Without it `os.walk` hides all errors.
    if not isinstance(error, FileNotFoundError):
        raise error


def file_size(path: Path) -> int:
    """Size of a file in bytes.

    Raises:
      FileNotFoundError: there is none.
    """
    if is_remote(path):
        return int(filesystem(path).size(os.fspath(path)))
    return path.stat().st_size


def remove_folder(folder: Path) -> None:
    """Delete a folder with all that is in it, if it is there."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(FileNotFoundError):
        filesystem(folder).rm(os.fspath(folder), recursive=True)


def move_folder(source: Path, target: Path) -> Path:
    """Rename a folder; an object store copies each object, then deletes the originals.

    A process that is killed in between leaves both folders. The objects do not pass
    through this machine.

    Returns:
      `target`.
    """
    if not is_remote(source):
        return source.rename(target)
    files = list_files(source)
    store = filesystem(source)
    # Not `rename` of etils, which asks S3 to copy the folder itself.
    store.copy(
        [os.fspath(source / name) for name in files],
        [os.fspath(target / name) for name in files],
    )
    remove_folder(source)
    return target


def create_exclusively(path: Path, data: bytes) -> bool:
    """Create an object that must not exist, with its contents, in one step.

    Google Cloud Storage does it under the condition `ifGenerationMatch=0`, S3 under
    `If-None-Match: *`. Of several processes one succeeds.

    Args:
      path: path in an object store.
      data: contents.

    Returns:
      Whether this call created it; False if it existed.
    """
    try:
        filesystem(path).pipe_file(os.fspath(path), data, mode="create")
    except FileExistsError:
        # The answer to the first attempt may have been lost, and the request repeated.
        return path.read_bytes() == data
    return True


def filesystem(path: Path) -> Any:
    """The fsspec file system of a path in an object store."""
    import fsspec

    scheme = _scheme(path)
    _prepare_store(scheme)
    # The same one as that of etils, which keeps its connections.
    options = {"finalize_on_close": True} if scheme == "gs" else {}
    return fsspec.filesystem("gcs" if scheme == "gs" else scheme, **options)


def object_key(path: Path) -> str:
    """Bucket and name of an object, as fsspec spells them in its answers."""
    return os.fspath(path).partition("://")[2].rstrip("/")


def path_argument(text: str) -> Path:
    """Parse a path of the command line, for `type=` of argparse."""
    return _argument(lambda: as_path(text))


def local_path_argument(text: str) -> Path:
    """Parse a path of the command line that must be local."""
    return _argument(lambda: local_path(text, "the path"))


def _argument(make: Callable[[], Path]) -> Path:
    import argparse

    try:
        return make()
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _scheme(path: str | os.PathLike[str]) -> str:
    scheme, separator, _ = os.fspath(path).partition("://")
    return scheme if separator else ""


@functools.cache
def _check_bucket(bucket: str) -> None:
    if not filesystem(as_path(bucket)).exists(bucket):
        raise FileNotFoundError(f"bucket '{bucket}' does not exist or may not be read")


@functools.cache
def _prepare_store(scheme: str) -> None:
    """Check that the package of a store is there, and set what etils and fsspec read.

    Raises:
      InputError: the package is not installed.
    """
    package, extra = _STORES[scheme]
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"{scheme}:// paths need the package {package}; install it with "
            f"`pip install '.[{extra}]'`"
        )
    # etils would use TensorFlow where it is installed, with other errors and settings.
    os.environ.setdefault("EPATH_USE_TF", "false")
    from fsspec.config import conf

    # A listing that is kept hides what other processes, and TensorStore in this one,
    # have written since.
    conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
