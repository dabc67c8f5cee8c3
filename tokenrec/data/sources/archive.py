"""Unpack an archive safely.

An archive is untrusted input: names that leave the folder, links, devices, and more
bytes or files than expected are refused.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from tokenrec.data.sources.download import BLOCK_BYTES, DISK_ERRORS
from tokenrec.errors import InputError, StorageError
from tokenrec.runtime.files import RetryingFile, reading_error
from tokenrec.runtime.retry import is_transient

MAX_FILES = 10_000  # in an archive
MAX_HEADER_BYTES = 1 << 18  # of the name or the attributes of a file in a tar

# Errors of the readers of archives where bytes are wrong, besides OSError. ValueError
# stands for a name or a number in a header.
_DAMAGE_ERRORS = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
    ValueError,
)


def extract(
    archive: Path,
    out: Path,
    *,
    max_bytes: int,
    strip: int = 0,
    wanted: Callable[[PurePosixPath], bool] | None = None,
) -> list[Path]:
    """Unpack the regular files of an archive into the new folder `out`.

    The files gather in `out` + ".incomplete", which is renamed when it is whole.

    Args:
      archive: .tar.gz, .tgz, .tar or .zip; recognised by content, not by suffix.
      out: folder to make.
      max_bytes: most bytes that may come out, all files together.
      strip: leading folders of each name to drop.
      wanted: returns whether to unpack a name (after `strip`); None unpacks all.

    Returns:
      Paths of the files.

    Raises:
      InputError: `out` exists, the archive is damaged or unpacks to more than
        `max_bytes` or `MAX_FILES`, or it holds a link, a device, an absolute name, or a
        name that leaves `out`.
    """
    archive, out = Path(archive), Path(out)
    if out.exists():
        raise InputError(
            f"folder '{out}' exists; delete it, or choose another folder to unpack "
            f"'{archive}' into"
        )
    incomplete = out.with_name(out.name + ".incomplete")
    if incomplete.exists():
        shutil.rmtree(incomplete)
    incomplete.mkdir(parents=True)
    try:
        paths = _unpack(archive, incomplete, max_bytes, strip, wanted)
    except InputError:
        shutil.rmtree(incomplete)
        raise
    except (OSError, *_DAMAGE_ERRORS) as error:
        shutil.rmtree(incomplete)
        raise _unpacking_problem(archive, out, error) from error
    os.replace(incomplete, out)
    return [out / path for path in paths]


def _unpack(
    archive: Path,
    folder: Path,
    max_bytes: int,
    strip: int,
    wanted: Callable[[PurePosixPath], bool] | None,
) -> list[PurePosixPath]:
    """Unpack into an existing folder; return the paths of the files in it."""
    paths: list[PurePosixPath] = []
    remaining = max_bytes
    for name, source in _members(archive):
        path = PurePosixPath(*_safe_parts(name, archive)[strip:])
        if not path.parts or (wanted is not None and not wanted(path)):
            continue
        if len(paths) == MAX_FILES:
            raise InputError(
                f"archive '{archive}' holds more than {MAX_FILES} files; check that it "
                "is the right file"
            )
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        # "x": a name that occurs twice is an error, not the last one's content.
        with open(target, "xb") as file:
            # Bytes are counted as they come out: sizes in headers may lie.
            while block := source.read(BLOCK_BYTES):
                remaining -= len(block)
                if remaining < 0:
                    raise InputError(
                        f"archive '{archive}' unpacks to more than "
                        f"max_bytes={max_bytes}; check that it is the right file"
                    )
                file.write(block)
        paths.append(path)
    return paths


def _unpacking_problem(
    archive: Path, out: Path, error: Exception
) -> InputError | StorageError:
    """Make the error to raise for an error of `_unpack`."""
    if isinstance(error, (FileExistsError, NotADirectoryError, IsADirectoryError)):
        return InputError(
            f"archive '{archive}' holds a name twice, or as a file and as a folder "
            f"({error.filename}); refused; check that it is the right file"
        )
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return InputError(
            f"'{out}' cannot be written ({error.strerror}); make room or choose "
            "another folder"
        )
    # Reads of the archive were tried again already; this may be a write as well.
    if is_transient(error):
        return reading_error(error, archive, "archive", "")
    return InputError(
        f"archive '{archive}' cannot be read ({error}); delete it and fetch it again"
    )


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield name and content of each regular file, read once from front to back."""
    with RetryingFile(archive) as file:
        magic = file.read(2)
    if magic == b"PK":
        yield from _zip_members(archive)
    else:
        yield from _tar_members(archive, is_gzip=magic == b"\x1f\x8b")


def _zip_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with RetryingFile(archive) as file, zipfile.ZipFile(file) as bundle:
        for info in bundle.infolist():
            if info.is_dir():
                continue
            # The upper half holds the mode of Unix; 0 is an archive of another system.
            mode = stat.S_IFMT(info.external_attr >> 16)
            if mode not in (0, stat.S_IFREG):
                raise _refusal(archive, info.filename)
            with bundle.open(info) as source:
                yield info.filename, source


def _tar_members(archive: Path, is_gzip: bool) -> Iterator[tuple[str, IO[bytes]]]:
    # The tarfile module would unpack gzip too, but does not look at its checksum.
    with (
        io.BufferedReader(RetryingFile(archive)) as compressed,
        gzip.open(compressed) if is_gzip else compressed as file,
    ):
        with tarfile.open(
            fileobj=file, mode="r|" if is_gzip else "r|*", tarinfo=_SmallMember
        ) as bundle:
            while (member := bundle.next()) is not None:
                # The module would keep every member, with its attributes.
                bundle.members.clear()  # type: ignore[attr-defined]
                if member.isdir():
                    continue
                content = bundle.extractfile(member) if member.isreg() else None
                if content is None:
                    raise _refusal(archive, member.name)
                with content:
                    yield member.name, content
        # The checksum comes after the end of the tar: read on, so that it is checked.
        while file.read(BLOCK_BYTES):
            pass


class _SmallMember(tarfile.TarInfo):
    """A member of a tar file whose headers are small; others are refused.

    A long name, attributes and the map of a sparse file come in headers of their own,
    of any size. The module reads each into memory as a whole, and a few kilobytes of
    gzip unpack to gigabytes of them.
    """

    def _proc_gnulong(self, bundle: tarfile.TarFile) -> tarfile.TarInfo:
        _check_header(self.size)
        return super()._proc_gnulong(bundle)  # type: ignore[misc]

    def _proc_pax(self, bundle: tarfile.TarFile) -> tarfile.TarInfo:
        _check_header(self.size)
        member = super()._proc_pax(bundle)  # type: ignore[misc]
        # Global attributes add up, over any number of headers.
        _check_header(sum(map(len, bundle.pax_headers.values())))
        return member

    def _proc_sparse(self, bundle: tarfile.TarFile) -> tarfile.TarInfo:
        raise tarfile.ReadError("a sparse file; pack it as a plain one")

    def _proc_gnusparse_00(self, *args: object) -> None:
        raise tarfile.ReadError("a sparse file; pack it as a plain one")

    _proc_gnusparse_01 = _proc_gnusparse_00
    _proc_gnusparse_10 = _proc_gnusparse_00


def _check_header(size: int) -> None:
    if size > MAX_HEADER_BYTES:
        raise tarfile.ReadError(
            f"names or attributes of {size} bytes, more than {MAX_HEADER_BYTES}"
        )


def _refusal(archive: Path, name: str) -> InputError:
    return InputError(
        f"archive '{archive}' holds '{name}', which is a link or a device; refused; "
        "check that it is the right file"
    )


def _safe_parts(name: str, archive: Path) -> tuple[str, ...]:
    """Return the parts of a name, unless it could leave the folder."""
    path = PurePosixPath(name)
    # A backslash or a colon would be a path of its own on Windows.
    is_unsafe = (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or "\0" in name
        or ":" in (path.parts or ("",))[0]
    )
    if is_unsafe:
        raise InputError(
            f"archive '{archive}' holds '{name}', a name that leaves the folder; "
            "refused; check that it is the right file"
        )
    return path.parts
