"""Fetches an archive that may be cut off at any byte, and unpacks it without trusting it."""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.client
import logging
import lzma
import os
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from tokenrec.errors import InputError

BLOCK_BYTES = 1 << 20
MAX_FILES = 10_000  # in an archive
_LATER = (408, 425, 429)  # the server asks for another try; every other 4xx is final

# What a socket does not say: the folder is at fault, and another try would not help.
_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
)

# What the readers of archives raise where bytes are wrong, besides OSError. ValueError: a name or a number in a header.
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
    ValueError,
)

_log = logging.getLogger(__name__)


def download(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
    attempts: int = 5,
    backoff_s: float = 1.0,
    timeout_s: float = 60.0,
) -> str:
    """Downloads `url` to `target` and returns its SHA-256; a cut download resumes, also in a later run.

    Bytes gather in `target` + ".part", which is renamed when it is whole and its checksum is right; the digest is kept
    in `target` + ".sha256". An existing `target` is checked, not fetched again. Without any checksum a warning says so,
    and an old ".part" is not trusted.

    Args:
      url: http or https.
      sha256, md5: hexadecimal digests that the file must have.
      size: bytes that the file must have.
      attempts: tries in a row that bring no new byte before it gives up.
      backoff_s: seconds before the second such try; doubles with each, up to a minute.
      timeout_s: seconds of silence after which a connection is given up.

    Raises:
      InputError: no such file, no network, wrong size or checksum, or not enough room on the disk.
    """
    if not url.startswith(("https://", "http://")):
        raise InputError(
            f"url '{url}' is neither http nor https; give the address of the file itself"
        )
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return _verify(target, target, url, sha256, md5, size)
    part = target.with_name(target.name + ".part")
    if sha256 is None and md5 is None:
        part.unlink(missing_ok=True)
    reached = part.stat().st_size if part.exists() else 0
    failures = 0
    while True:
        try:
            _receive(url, part, timeout_s)
            break
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = _reason(error, url, part)
        now = part.stat().st_size if part.exists() else 0
        failures = 0 if now > reached else failures + 1
        reached = max(reached, now)
        if failures >= attempts:
            raise InputError(
                f"url '{url}' could not be fetched in {attempts} tries ({reason}); check the network and run it again "
                f"(it resumes), or place the file at '{target}' yourself"
            )
        _log.warning("%s after %d bytes of %s; trying again", reason, now, url)
        time.sleep(min(60.0, backoff_s * 2.0 ** max(0, failures - 1)))
    digest = _verify(part, target, url, sha256, md5, size)
    os.replace(part, target)
    return digest


def _reason(error: Exception, url: str, part: Path) -> str:
    """Why a try failed, if another may succeed; otherwise raises."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        if 400 <= error.code < 500 and error.code not in _LATER:
            raise InputError(
                f"url '{url}' answers {error.code} {error.msg}; check the address"
            )
        return f"the server answered {error.code}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    if isinstance(error, OSError) and error.errno in _DISK:
        raise InputError(
            f"'{part}' cannot be written ({error.strerror}); make room or choose another folder"
        ) from error
    return str(error) or type(error).__name__


def _receive(url: str, part: Path, timeout_s: float) -> None:
    """Appends to `part` until the body ends; a body shorter than announced is an `http.client.IncompleteRead`."""
    offset = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "tokenrec", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=timeout_s
        )
    except urllib.error.HTTPError as error:
        if error.code != 416 or not offset:
            raise
        # Nothing lies beyond what is here: it is whole, or it is not this file and must be fetched anew.
        error.close()
        if error.headers.get("Content-Range", "").rpartition("/")[2] != str(offset):
            part.unlink()
            raise ConnectionError(
                "the partial file does not fit the one on the server"
            ) from error
        return
    with response:
        announced = response.headers.get("Content-Length")
        remaining = (
            int(announced) if announced is not None and announced.isdigit() else None
        )
        if offset and not _continues(response, offset):
            offset = 0  # the server sends the whole file, whatever was asked for
        _check_room(part, remaining, offset)
        received = 0
        with open(part, "ab" if offset else "wb") as file:
            while block := response.read(BLOCK_BYTES):
                file.write(block)
                received += len(block)
        if remaining is not None and received < remaining:
            raise http.client.IncompleteRead(b"", remaining - received)


def _continues(response: http.client.HTTPResponse, offset: int) -> bool:
    return response.status == 206 and response.headers.get(
        "Content-Range", ""
    ).startswith(f"bytes {offset}-")


def _check_room(part: Path, remaining: int | None, offset: int) -> None:
    free = shutil.disk_usage(part.parent).free + (
        part.stat().st_size - offset if part.exists() else 0
    )
    if remaining is not None and remaining > free:
        raise InputError(
            f"folder '{part.parent}' has {free / 1e9:.1f} GB free and the download needs {remaining / 1e9:.1f} GB; "
            "make room or choose another folder"
        )


def _verify(
    path: Path,
    target: Path,
    url: str,
    sha256: str | None,
    md5: str | None,
    size: int | None,
) -> str:
    """SHA-256 of `path`; a partial file with the wrong content is deleted, so that the next run starts anew."""
    found_sha256, found_md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            found_sha256.update(block)
            if md5 is not None:
                found_md5.update(block)
    digest = found_sha256.hexdigest()
    checks: tuple[tuple[str, str | int | None, str | int], ...] = (
        ("size", size, path.stat().st_size),
        ("sha256", sha256.lower() if sha256 else None, digest),
        ("md5", md5.lower() if md5 else None, found_md5.hexdigest()),
    )
    for name, wanted, found in checks:
        if wanted is not None and found != wanted:
            if path != target:
                path.unlink()
                remedy = "the download was discarded; run it again, or check the expected value"
            else:
                remedy = "delete it and run again"
            raise InputError(
                f"'{target}' from '{url}' has {name} {found}, expected {wanted}; {remedy}"
            )
    if sha256 is None and md5 is None:
        _log.warning(
            "NOT CHECKED: no checksum is known for %s; what came has sha256 %s",
            url,
            digest,
        )
    target.with_name(target.name + ".sha256").write_text(f"{digest}  {target.name}\n")
    return digest


def extract(
    archive: Path,
    out: Path,
    *,
    max_bytes: int,
    strip: int = 0,
    wanted: Callable[[PurePosixPath], bool] | None = None,
) -> list[Path]:
    """Unpacks regular files of a .tar.gz, .tgz, .tar or .zip into the new folder `out`; returns their paths.

    The files gather in `out` + ".incomplete", which is renamed when it is whole.

    Args:
      max_bytes: most bytes that may come out, all files together.
      strip: leading folders of each name to drop.
      wanted: which names (after `strip`) to unpack; all by default.

    Raises:
      InputError: `out` exists, the archive is damaged or unpacks to more than `max_bytes` or `MAX_FILES`, or it
        holds a link, a device, an absolute name, or a name that leaves `out`.
    """
    archive, out = Path(archive), Path(out)
    if out.exists():
        raise InputError(
            f"folder '{out}' exists; delete it, or choose another folder to unpack '{archive}' into"
        )
    incomplete = out.with_name(out.name + ".incomplete")
    if incomplete.exists():
        shutil.rmtree(incomplete)
    incomplete.mkdir(parents=True)
    written: list[Path] = []
    room = max_bytes
    try:
        for name, source in _members(archive):
            path = PurePosixPath(*_safe_parts(name, archive)[strip:])
            if not path.parts or (wanted is not None and not wanted(path)):
                continue
            if len(written) == MAX_FILES:
                raise InputError(
                    f"archive '{archive}' holds more than {MAX_FILES} files; is it the right file?"
                )
            target = incomplete / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as file:
                while block := source.read(BLOCK_BYTES):
                    room -= len(block)
                    if room < 0:
                        raise InputError(
                            f"archive '{archive}' unpacks to more than max_bytes={max_bytes}; is it the right file?"
                        )
                    file.write(block)
            written.append(out / path)
    except InputError:
        shutil.rmtree(incomplete)
        raise
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        shutil.rmtree(incomplete)
        raise InputError(
            f"archive '{archive}' holds a name twice, or as a file and as a folder ({error.filename}); refused"
        ) from error
    except (OSError, *_DAMAGE) as error:
        shutil.rmtree(incomplete)
        if isinstance(error, OSError) and error.errno in _DISK:
            raise InputError(
                f"'{out}' cannot be written ({error.strerror}); make room or choose another folder"
            ) from error
        raise InputError(
            f"archive '{archive}' cannot be read ({error}); delete it and fetch it again"
        ) from error
    os.replace(incomplete, out)
    return written


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of each regular file, read once from front to back."""
    with open(archive, "rb") as file:
        magic = file.read(2)
    if magic == b"PK":
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                if info.is_dir():
                    continue
                mode = stat.S_IFMT(info.external_attr >> 16)
                if mode not in (0, stat.S_IFREG):
                    raise _refusal(archive, info.filename)
                with bundle.open(info) as source:
                    yield info.filename, source
        return
    is_gzip = magic == b"\x1f\x8b"
    # The tarfile module would unpack gzip too, but without a look at its checksum.
    with gzip.open(archive) if is_gzip else open(archive, "rb") as file:
        with tarfile.open(fileobj=file, mode="r|" if is_gzip else "r|*") as bundle:
            for member in bundle:
                if member.isdir():
                    continue
                content = bundle.extractfile(member) if member.isreg() else None
                if content is None:
                    raise _refusal(archive, member.name)
                with content:
                    yield member.name, content
        while file.read(BLOCK_BYTES):  # the checksum comes after the end of the tar
            pass


def _refusal(archive: Path, name: str) -> InputError:
    return InputError(
        f"archive '{archive}' holds '{name}', which is a link or a device; refused"
    )


def _safe_parts(name: str, archive: Path) -> tuple[str, ...]:
    path = PurePosixPath(name)
    unsafe = (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or "\0" in name
        or ":" in (path.parts or ("",))[0]
    )
    if unsafe:
        raise InputError(
            f"archive '{archive}' holds '{name}', a name that leaves the folder; refused"
        )
    return path.parts
