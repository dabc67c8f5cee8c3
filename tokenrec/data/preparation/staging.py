"""Write a folder so that it appears complete or not at all.

A data set is written to `<out>.incomplete-<pid>` beside its final place, flushed to
disk and renamed, which is atomic within one file system. `prepare` therefore never
leaves a half-written data set under the name that the user gave, and a failed run keeps
the data set that was there before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tokenrec.data.metadata import METADATA_FILE
from tokenrec.errors import InputError, StorageError
from tokenrec.runtime.retry import is_transient, retry, storage_error

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def staged_folder(
    out: Path, overwrite: bool, marker: str = METADATA_FILE
) -> Iterator[Path]:
    """Yield a new folder that becomes `out` when the block ends without an error.

    On an error the new folder is removed and a previous `out` stays as it was.
    Leftovers of processes that no longer run are removed first.

    Args:
      out: final path of the folder.
      overwrite: replace `out` if it is a prepared data set.
      marker: a file that every folder of this kind holds.

    Raises:
      InputError: `out` exists, and `overwrite` is False or `out` is not a prepared data
        set (holds no `marker`); or the disk is full.
      StorageError: the disk of `out` is at fault.
    """
    out = Path(os.path.abspath(out))
    _check_replaceable(out, overwrite, marker)
    remove_leftovers(out)
    folder = out.with_name(f"{out.name}.incomplete-{os.getpid()}")
    try:
        retry(lambda: folder.mkdir(parents=True, exist_ok=True), folder)
    except StorageError:
        raise
    except OSError as error:
        raise InputError(
            f"out='{out}': cannot make '{folder}': {error.strerror}; "
            "choose another folder"
        ) from error
    try:
        yield folder
        # The contents must be on disk before the name is: a rename may survive a power
        # failure that the data of the files does not.
        _sync_tree(folder)
        _publish(folder, out, overwrite, marker)
    # ArrayRecordWriter reports a full disk as a RuntimeError.
    except (OSError, RuntimeError) as error:
        if not _is_full_disk(error):
            # Of a write that failed, ArrayRecord tells in a RuntimeError too.
            if is_transient(error) and not isinstance(error, StorageError):
                raise storage_error(error, folder) from error
            raise
        raise InputError(
            f"out='{out}': no space left on the disk, or the quota is used up; free "
            "some, or choose an out or scratch folder on another disk; nothing was "
            "left behind"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch_folder(parent: Path, out: Path) -> Path:
    """Name a folder for temporary files of this process, and remove those of dead ones.

    Args:
      parent: folder to put it in.
      out: final path of the data set, after which it is named.

    Returns:
      The path; the folder does not exist yet.
    """
    name = parent / f"{Path(os.path.abspath(out)).name}.scratch"
    remove_leftovers(name)
    return name.with_name(f"{name.name}.incomplete-{os.getpid()}")


def _check_replaceable(out: Path, overwrite: bool, marker: str) -> None:
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise InputError(
            f"out='{out}' exists; give another folder, or overwrite it with --overwrite"
        )
    # Only an empty folder or a data set is ever deleted, whatever the user asked for.
    is_empty = out.is_dir() and not any(out.iterdir())
    if out.is_symlink() or not (is_empty or (out / marker).is_file()):
        raise InputError(
            f"out='{out}' is not a prepared data set, so it is not overwritten; "
            "give another folder"
        )


def remove_leftovers(out: Path) -> None:
    """Remove incomplete folders of dead processes.

    An `out` that such a process had moved aside is put back.
    """
    if not out.parent.is_dir():
        return
    for kind in ("incomplete", "previous"):
        for folder in out.parent.glob(f"{_escape_glob(out.name)}.{kind}-*"):
            pid = folder.name.rpartition("-")[2]
            # A folder of this process can only be left from an earlier call.
            if not pid.isdigit() or (int(pid) != os.getpid() and _is_alive(int(pid))):
                continue
            if kind == "previous" and not out.exists():
                folder.rename(out)
            else:
                shutil.rmtree(folder)


def _publish(folder: Path, out: Path, overwrite: bool, marker: str) -> None:
    """Rename `folder` to `out`; a previous `out` is moved aside until that is done."""
    # Preparation takes long: another process may have made `out` in the meantime.
    _check_replaceable(out, overwrite, marker)
    previous = out.with_name(f"{out.name}.previous-{os.getpid()}")
    if out.exists():
        out.rename(previous)
    try:
        folder.rename(out)
    except OSError:
        if previous.exists():
            previous.rename(out)
        raise
    _sync(out.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return True
    # ArrayRecord and NumPy raise errors without an errno; `ndarray.tofile` says only
    # "2000 requested and 512 written".
    text = str(error)
    return any(os.strerror(code) in text for code in _FULL_DISK) or (
        "requested and" in text and "written" in text
    )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # The process runs under another user.
        return True
    return True


def _escape_glob(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
