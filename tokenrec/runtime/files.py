"""Write files atomically, and read and write JSON.

A file that is written here is replaced in one step (`rename` in the same folder), so a
reader or a run that was killed sees the old contents or the new ones, never a part. In an
object store, whose writes replace an object at once, it is written locally and uploaded.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenrec.errors import InputError, StorageError
from tokenrec.runtime.paths import filesystem, is_remote, make_folder
from tokenrec.runtime.retry import is_transient, retry, storage_error

_LIMIT_TEXT = os.strerror(errno.EMFILE).lower()


def write_json(
    path: Path, value: Mapping[str, Any] | Sequence[Mapping[str, Any]]
) -> None:
    """Write `value` as JSON; missing parent folders are created.

    Raises:
      ValueError: a number is NaN or infinite, which JSON cannot represent.
      StorageError: the storage is at fault, again and again.
    """
    make_folder(path.parent)
    write_text_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file in UTF-8; if the write fails, `path` keeps its contents.

    Raises:
      StorageError: the storage is at fault, again and again.
    """

    def write() -> None:
        with atomic_replace(path) as partial:
            partial.write_text(text, encoding="utf-8")

    retry(write, path)


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
    except OSError as error:
        # Errors of a write or a sync, such as a full disk, do not name the file.
        if error.filename is None:
            error.filename = os.fspath(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    # Without this a power failure after the rename can leave an empty file.
    with path.open("rb") as file:
        os.fsync(file.fileno())


def is_file(path: Path) -> bool:
    """Whether a path is a file; never False because the storage is at fault.

    Raises:
      InputError: the path may not be looked up.
      StorageError: the storage is at fault, again and again.
    """

    def look_up() -> bool:
        if is_remote(path):
            return path.is_file()
        try:
            return stat.S_ISREG(path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    return read_with_retries(look_up, path, "", "check the path and its permissions")


def read_with_retries[T](
    read: Callable[[], T],
    path: Path,
    what: str,
    remedy: str,
    damage: tuple[type[Exception], ...] = (),
) -> T:
    """Call a function that reads a file, again where the storage is at fault.

    Args:
      read: the function; it must be safe to call again after it has failed.
      path: the file.
      what: name of the file for error messages; its path is added.
      remedy: what the user can do about a file that is missing or damaged.
      damage: errors of `read`, besides OSError, that mean a damaged file.

    Returns:
      What `read` returns.

    Raises:
      StorageError: the storage is at fault, again and again.
      InputError: the file is missing, damaged, or may not be read.
    """
    try:
        return retry(read, path)
    except Exception as error:
        # An InputError is a ValueError, which may be among the errors of damage.
        if isinstance(error, InputError) or not isinstance(error, (OSError, *damage)):
            raise
        raise reading_error(error, path, what, remedy) from error


def reading_error(
    error: Exception, path: Path, what: str, remedy: str
) -> InputError | StorageError:
    """Make the error for a file that could not be read.

    Only wrong contents ask for another file. A storage fault may pass, and a limit of
    the process says nothing about the file.

    Args:
      error: what reading raised.
      path: the file.
      what: name of the file for error messages; its path is added.
      remedy: what the user can do about a file that is missing or damaged.
    """
    if isinstance(error, StorageError):
        return error
    if is_transient(error):
        return storage_error(error, path)
    where = f"{what} '{path}'".strip()
    reason = str(getattr(error, "strerror", None) or error).strip() or repr(error)
    reason = reason.partition("\n")[0].rstrip(".")
    # Libraries in C++ pass the text on, but not the number.
    if (
        getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)
        or _LIMIT_TEXT in reason.lower()
    ):
        # Here, because systems without such limits have no such module.
        import resource

        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        return InputError(
            f"{where} cannot be opened: {reason}; the file is not at fault: this "
            f"process may have {limit} files open; raise the limit, `ulimit -n {most}`"
        )
    return InputError(f"{where} cannot be read: {reason}; {remedy}")


def digest_file(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits; it is read once, without retries."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RetryingFile(io.RawIOBase):
    """A file that is read from any place; a read that the storage fails is repeated.

    Raises:
      OSError: the file cannot be opened or read; a StorageError if the storage is at
        fault, again and again.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._position = 0
        self._file: io.FileIO | None = None
        retry(self._opened, path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = retry(lambda: self._opened().seek(offset, whence), self._path)
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = retry(lambda: self._read(buffer), self._path)
        self._position += count
        return count

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    def _read(self, buffer: Any) -> int:
        try:
            self._opened().seek(self._position)
            return self._opened().readinto(buffer) or 0
        except OSError:
            # A handle that has become stale stays so; the next attempt opens the path.
            file, self._file = self._file, None
            if file is not None:
                file.close()
            raise

    def _opened(self) -> io.FileIO:
        if self._file is None:
            self._file = io.FileIO(self._path)
            # Where `seek` counts from, if it counts from the current place.
            self._file.seek(self._position)
        return self._file


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
      StorageError: the storage is at fault, again and again.
    """
    text = read_with_retries(path.read_bytes, path, what, remedy)
    return parse_json(text, f"{what} '{path}'", remedy)
