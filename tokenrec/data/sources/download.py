"""Download a file with resumption and checksums.

A file that was cut off is continued, within a run or in a later one, and no byte is
trusted before the checksum of the whole file is right.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import logging
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from tokenrec.errors import InputError

BLOCK_BYTES = 1 << 20

# Timeout, too early, too many requests: the server may answer another try. Every other
# status 4xx is final.
_RETRY_STATUSES = (408, 425, 429)

# A socket does not report these: the folder is at fault, and another try would not
# help.
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
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
    """Download `url` to `target`; a cut download resumes, also in a later run.

    Bytes gather in `target` + ".part", which is renamed when it is whole and its
    checksum is right; the digest is kept in `target` + ".sha256". An existing `target`
    is checked and not downloaded again. Without any checksum a warning says so, and a
    ".part" of an earlier run is not trusted.

    Args:
      url: http or https.
      target: path of the file to make.
      sha256: hexadecimal digest that the file must have.
      md5: hexadecimal digest that the file must have.
      size: bytes that the file must have.
      attempts: tries in a row without a new byte, after which it gives up.
      backoff_s: seconds before the second such try; doubles with each, up to a minute.
      timeout_s: seconds of silence after which a connection is given up.

    Returns:
      The SHA-256 of the file.

    Raises:
      InputError: there is no such file, no network, a wrong size or checksum, or not
        enough room on the disk.
    """
    if not url.startswith(("https://", "http://")):
        raise InputError(
            f"url '{url}' is neither http nor https; give the address of the file "
            "itself"
        )
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return _verify(target, target, url, sha256, md5, size)
    part = target.with_name(target.name + ".part")
    if sha256 is None and md5 is None:
        part.unlink(missing_ok=True)
    # A try that brings new bytes starts the count again: a large file may take any
    # number of connections, but a server that sends nothing is given up.
    reached = part.stat().st_size if part.exists() else 0
    failures = 0
    while True:
        try:
            _receive(url, part, timeout_s)
            break
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = _retry_reason(error, url, part)
        now = part.stat().st_size if part.exists() else 0
        failures = 0 if now > reached else failures + 1
        reached = max(reached, now)
        if failures >= attempts:
            raise InputError(
                f"url '{url}' could not be fetched in {attempts} tries ({reason}); "
                "check the network and run it again (it resumes), or place the file at "
                f"'{target}' yourself"
            )
        _log.warning("%s after %d bytes of %s; trying again", reason, now, url)
        time.sleep(min(60.0, backoff_s * 2.0 ** max(0, failures - 1)))
    digest = _verify(part, target, url, sha256, md5, size)
    os.replace(part, target)
    return digest


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to http and https, and never from https to http.

    urllib would follow them to ftp as well, where no certificate says who answers.
    """

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: Any,
        code: int,
        msg: str,
        headers: Any,
        newurl: str,
    ) -> urllib.request.Request | None:
        allowed = ("https",) if req.type == "https" else ("https", "http")
        scheme = urllib.parse.urlsplit(newurl).scheme.lower()
        if scheme not in allowed:
            fp.close()
            raise InputError(
                f"url '{req.full_url}' redirects to '{newurl}', which is not "
                f"{' or '.join(allowed)}; refused; give the address of the file itself"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _retry_reason(error: Exception, url: str, part: Path) -> str:
    """Return the reason of a failed try, if another may succeed; otherwise raise."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        # A redirect that was followed raises nothing.
        if 300 <= error.code < 500 and error.code not in _RETRY_STATUSES:
            raise InputError(
                f"url '{url}' answers {error.code} {error.msg}; check the address"
            )
        return f"the server answered {error.code}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        raise InputError(
            f"'{part}' cannot be written ({error.strerror}); make room or choose "
            "another folder"
        ) from error
    return str(error) or type(error).__name__


def _receive(url: str, part: Path, timeout_s: float) -> None:
    """Append to `part` until the body ends.

    Raises:
      http.client.IncompleteRead: the body is shorter than the server announced.
    """
    offset = part.stat().st_size if part.exists() else 0
    # Without "identity" a server may compress the body, and offsets would not fit.
    headers = {"User-Agent": "tokenrec", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        response = urllib.request.build_opener(_WebRedirects).open(
            urllib.request.Request(url, headers=headers), timeout=timeout_s
        )
    except urllib.error.HTTPError as error:
        if error.code != 416 or not offset:
            raise
        # 416: there are no bytes beyond those that are here. Either the file is whole,
        # or it is another file and must be downloaded anew.
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
            # The server ignores ranges and sends the file from its start.
            offset = 0
        _check_room(part, remaining, offset)
        received = 0
        with open(part, "ab" if offset else "wb") as file:
            while block := response.read(BLOCK_BYTES):
                file.write(block)
                received += len(block)
        if remaining is not None and received < remaining:
            raise http.client.IncompleteRead(b"", remaining - received)


def _continues(response: http.client.HTTPResponse, offset: int) -> bool:
    """Return whether a response begins at `offset`."""
    content_range = response.headers.get("Content-Range", "")
    return response.status == 206 and content_range.startswith(f"bytes {offset}-")


def _check_room(part: Path, remaining: int | None, offset: int) -> None:
    """Check that the disk has room for `remaining` bytes from `offset` on."""
    # Bytes of `part` beyond the offset will be overwritten.
    reused = part.stat().st_size - offset if part.exists() else 0
    free = shutil.disk_usage(part.parent).free + reused
    if remaining is not None and remaining > free:
        raise InputError(
            f"folder '{part.parent}' has {free / 1e9:.1f} GB free and the download "
            f"needs {remaining / 1e9:.1f} GB; make room or choose another folder"
        )


def _verify(
    path: Path,
    target: Path,
    url: str,
    sha256: str | None,
    md5: str | None,
    size: int | None,
) -> str:
    """Check `path`, write its digest beside `target`, and return its SHA-256.

    A partial file with the wrong content is deleted, so that the next run starts anew.
    A `target` that was there before may be the user's own file and stays.
    """
    actual_sha256 = hashlib.sha256()
    actual_md5 = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            actual_sha256.update(block)
            if md5 is not None:
                actual_md5.update(block)
    digest = actual_sha256.hexdigest()
    # A wrong size is named first: it explains a wrong digest.
    checks: tuple[tuple[str, str | int | None, str | int], ...] = (
        ("size", size, path.stat().st_size),
        ("sha256", sha256.lower() if sha256 else None, digest),
        ("md5", md5.lower() if md5 else None, actual_md5.hexdigest()),
    )
    for name, expected, actual in checks:
        if expected is not None and actual != expected:
            remedy = "delete it and run again"
            if path != target:
                path.unlink()
                remedy = (
                    "the download was discarded; run it again, or check the expected "
                    "value"
                )
            raise InputError(
                f"'{target}' from '{url}' has {name} {actual}, expected {expected}; "
                f"{remedy}"
            )
    if sha256 is None and md5 is None:
        _log.warning(
            "NOT CHECKED: no checksum is known for %s; the file has sha256 %s",
            url,
            digest,
        )
    target.with_name(target.name + ".sha256").write_text(f"{digest}  {target.name}\n")
    return digest
