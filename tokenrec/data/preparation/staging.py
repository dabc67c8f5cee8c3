"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tokenrec.data.metadata import METADATA_FILE
from tokenrec.errors import InputError

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a new sibling folder, `<out>.incomplete-<pid>`, which becomes `out` when the block ends without an error.

    On an error the folder is removed and a previous `out` stays as it was. What a dead process left behind is removed.

    Raises:
      InputError: `out` exists, and `overwrite` is False or `out` is not a prepared data set; or the disk is full.
    """
    out = Path(os.path.abspath(out))
    _check(out, overwrite)
    _clean(out)
    folder = out.with_name(f"{out.name}.incomplete-{os.getpid()}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"out='{out}': cannot make '{folder}': {error.strerror}; choose another folder"
        ) from error
    try:
        yield folder
        _sync(folder)
        _publish(folder, out, overwrite)
    except (
        OSError,
        RuntimeError,
    ) as error:  # ArrayRecordWriter reports a full disk as a RuntimeError
        if not _is_full_disk(error):
            raise
        raise InputError(
            f"out='{out}': no space left on the disk, or the quota is used up; free some, or choose an out or scratch "
            f"folder on another disk; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch_folder(parent: Path, out: Path) -> Path:
    """A name for temporary files of this process under `parent`; those of dead processes are removed."""
    name = parent / f"{Path(os.path.abspath(out)).name}.scratch"
    _clean(name)
    return name.with_name(f"{name.name}.incomplete-{os.getpid()}")


def _check(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise InputError(
            f"out='{out}' exists; give another folder, or overwrite it with --overwrite"
        )
    is_empty = out.is_dir() and not any(out.iterdir())
    if out.is_symlink() or not (is_empty or (out / METADATA_FILE).is_file()):
        raise InputError(
            f"out='{out}' is not a prepared data set, so it is not overwritten; give another folder"
        )


def _clean(out: Path) -> None:
    """Removes incomplete folders of dead processes; puts back an `out` that one of them had moved aside."""
    if not out.parent.is_dir():
        return
    for kind in ("incomplete", "previous"):
        for folder in out.parent.glob(f"{_escape(out.name)}.{kind}-*"):
            pid = folder.name.rpartition("-")[2]
            if not pid.isdigit() or (int(pid) != os.getpid() and _is_alive(int(pid))):
                continue
            if kind == "previous" and not out.exists():
                folder.rename(out)
            else:
                shutil.rmtree(folder)


def _publish(folder: Path, out: Path, overwrite: bool) -> None:
    _check(out, overwrite)
    previous = out.with_name(f"{out.name}.previous-{os.getpid()}")
    if out.exists():
        out.rename(previous)
    try:
        folder.rename(out)
    except OSError:
        if previous.exists():
            previous.rename(out)
        raise
    _sync_path(out.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _sync(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync_path(Path(root, name))
        _sync_path(Path(root))


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return True
    text = str(error)  # ndarray.tofile says only "2000 requested and 512 written"
    return any(os.strerror(code) in text for code in _FULL_DISK) or (
        "requested and" in text and "written" in text
    )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, under another user
        return True
    return True


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
