"""Copy a folder or file of an object store to this machine.

ArrayRecord, memory-mapped arrays and the tokenizer need local files. The copy lies in
`TOKENREC_CACHE` (`~/.cache/tokenrec`), which all processes of a machine share: one of
them downloads while the others wait, and a later start finds the files there.

The copy is named by what the object store lists: names, sizes, and the versions of the
objects. If the data set is replaced, the next start makes another copy.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenrec.errors import InputError
from tokenrec.runtime.files import atomic_replace
from tokenrec.runtime.paths import as_path, filesystem, is_remote, object_key
from tokenrec.runtime.retry import retry

CACHE_VARIABLE = "TOKENREC_CACHE"
_LOCK = ".lock"


class _StoredFile(NamedTuple):
    """An object.

    Attributes:
      size: bytes.
      version: changes whenever the object is written.
      md5: digest of the contents in base64; empty if the store does not tell it.
    """

    size: int
    version: str
    md5: str


def local_copy(path: str | os.PathLike[str]) -> Path:
    """Return a local path with the contents of `path`, downloaded where necessary.

    Args:
      path: folder or file; a local one is returned as it is.

    Raises:
      InputError: nothing is there, or the copy cannot be written.
      StorageError: the object store is at fault, again and again.
    """
    remote = as_path(path)
    if not is_remote(remote):
        return remote
    is_object, files = retry(lambda: _list(remote), remote)
    if not files:
        raise InputError(
            f"'{remote}' holds no file; check the path, and the rights to read it"
        )
    folder = cache_folder() / f"{remote.name}-{_identity(remote, files)}"
    try:
        with _only_one(folder):
            _download_missing(remote.parent if is_object else remote, files, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        size = sum(file.size for file in files.values())
        raise InputError(
            f"the copy of '{remote}' ({size / 1e9:,.3g} GB) cannot be written to "
            f"'{folder}': {error.strerror}; free disk space, or name another folder in "
            f"{CACHE_VARIABLE}"
        ) from error
    return folder / remote.name if is_object else folder


def cache_folder() -> Path:
    """Folder of the copies."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "tokenrec"


def _list(remote: Path) -> tuple[bool, dict[str, _StoredFile]]:
    """Whether `remote` is an object itself, and its objects by their relative names."""
    key = object_key(remote)
    found = filesystem(remote).find(os.fspath(remote), detail=True)
    if key in found:
        return True, {remote.name: _stored_file(found[key])}
    return False, {
        name.removeprefix(key + "/"): _stored_file(info)
        for name, info in found.items()
        # Consoles of object stores make empty objects that stand for folders.
        if name.startswith(key + "/") and not name.endswith("/")
    }


def _stored_file(info: Mapping[str, Any]) -> _StoredFile:
    # GCS counts generations. S3 has an ETag, which is not always a digest.
    version = info.get("generation") or info.get("ETag") or ""
    return _StoredFile(int(info["size"]), str(version), info.get("md5Hash") or "")


def _identity(remote: Path, files: Mapping[str, _StoredFile]) -> str:
    value = [os.fspath(remote), sorted(files.items())]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Let one process of this machine at a time into the block."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"tokenrec: waiting for another process that downloads to '{folder}'",
                file=sys.stderr,
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        # The system releases the lock with the file, also when the process is killed.
        yield


def _download_missing(
    source: Path, files: Mapping[str, _StoredFile], folder: Path
) -> None:
    """Download the files that the folder lacks, or has with another size."""
    missing = [
        name for name, file in files.items() if not _is_there(folder, name, file)
    ]
    if not missing:
        return
    size = sum(files[name].size for name in missing)
    print(
        f"tokenrec: downloading {len(missing)} files ({size / 1e9:,.3g} GB) of "
        f"'{source}' to '{folder}'",
        file=sys.stderr,
    )
    for name in missing:
        _download(source / name, files[name], folder / name)


def _is_there(folder: Path, name: str, file: _StoredFile) -> bool:
    path = folder / name
    return path.is_file() and path.stat().st_size == file.size


def _download(source: Path, file: _StoredFile, target: Path) -> None:
    """Download an object; a file of this name is complete, and has its digest.

    Raises:
      InputError: what arrived is not what the store lists.
    """
    target.parent.mkdir(parents=True, exist_ok=True)

    def download() -> None:
        with atomic_replace(target) as partial:
            filesystem(source).get_file(os.fspath(source), os.fspath(partial))
            _check(source, file, partial)

    retry(download, source)


def _check(source: Path, file: _StoredFile, path: Path) -> None:
    size = path.stat().st_size
    if size != file.size:
        raise InputError(
            f"'{source}' arrived with {size:,} bytes, not {file.size:,}; it was replaced "
            "meanwhile: rerun the command when the data set is complete"
        )
    if not file.md5:
        return
    with path.open("rb") as data:
        digest = hashlib.file_digest(data, "md5").digest()
    if base64.b64encode(digest).decode() != file.md5:
        raise InputError(
            f"'{source}' arrived with other contents than the store lists (MD5); rerun "
            "the command"
        )
