"""Tests of downloads from a server that cuts connections, ignores ranges or is busy."""

from __future__ import annotations

import hashlib
import http.server
import io
import logging
import re
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tokenrec.data.sources.download import _WebRedirects, download
from tokenrec.errors import InputError

BODY = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
MD5 = hashlib.md5(BODY).hexdigest()


class Server:
    """Behaviour of the server, and the ranges that it was asked for."""

    def __init__(self) -> None:
        self.body = BODY
        self.ranges = True
        self.cuts: list[
            int
        ] = []  # bytes sent of each of the next answers before the connection drops
        self.statuses: list[int] = []  # errors of the next answers
        self.redirects: list[str] = []  # addresses that the next answers point to
        self.asked: list[str | None] = []
        self.url = ""


def handler_of(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            server.asked.append(wanted)
            if server.statuses:
                self.send_error(server.statuses.pop(0))
                return
            if server.redirects:
                self.send_response(302)
                self.send_header("Location", server.redirects.pop(0))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = (
                int(wanted.removeprefix("bytes=").removesuffix("-"))
                if wanted and server.ranges
                else 0
            )
            total = len(server.body)
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            self.send_header("Content-Length", str(total - start))
            self.end_headers()
            stop = start + server.cuts.pop(0) if server.cuts else total
            self.wfile.write(server.body[start:stop])

        def log_message(self, format: str, *args: object) -> None:
            return

    return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = Server()
    with http.server.HTTPServer(("127.0.0.1", 0), handler_of(state)) as listener:
        state.url = f"http://127.0.0.1:{listener.server_port}/data.tar.gz"
        thread = threading.Thread(
            target=listener.serve_forever, kwargs={"poll_interval": 0.01}
        )
        thread.start()
        try:
            yield state
        finally:
            listener.shutdown()
            thread.join(timeout=10)


def fetch(
    server: Server, target: Path, *, sha256: str | None = SHA256, attempts: int = 3
) -> str:
    return download(
        server.url,
        target,
        sha256=sha256,
        attempts=attempts,
        backoff_s=0.0,
        timeout_s=10.0,
    )


def test_a_whole_download_lands_with_its_digest_beside_it(
    server: Server, tmp_path: Path
) -> None:
    target = tmp_path / "new" / "data.tar.gz"
    assert (
        download(server.url, target, sha256=SHA256.upper(), md5=MD5, size=len(BODY))
        == SHA256
    )
    assert target.read_bytes() == BODY
    assert (
        tmp_path / "new" / "data.tar.gz.sha256"
    ).read_text() == f"{SHA256}  data.tar.gz\n"
    assert not target.with_name("data.tar.gz.part").exists()


def test_a_cut_connection_resumes_where_it_broke(
    server: Server, tmp_path: Path
) -> None:
    server.cuts = [100_000, 50_000]
    fetch(server, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert server.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_run_resumes_the_part_of_an_earlier_one(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "f.part").write_bytes(BODY[:123_456])
    fetch(server, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert server.asked == ["bytes=123456-"]


def test_a_part_that_is_already_whole_is_only_verified(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "f.part").write_bytes(BODY)
    fetch(server, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_part_longer_than_the_file_is_fetched_anew(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "f.part").write_bytes(BODY + b"more")
    fetch(server, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert server.asked == [f"bytes={len(BODY) + 4}-", None]


def test_a_server_without_ranges_is_read_from_the_start_again(
    server: Server, tmp_path: Path
) -> None:
    server.ranges = False
    server.cuts = [200_000]
    fetch(server, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert len(server.asked) == 2


def test_tries_without_progress_are_bounded_and_keep_the_part(
    server: Server, tmp_path: Path
) -> None:
    server.cuts = [1000] + [0] * 20
    with pytest.raises(
        InputError, match=r"could not be fetched in 3 tries .*place the file at"
    ):
        fetch(server, tmp_path / "f")
    assert len(server.asked) == 4
    assert (tmp_path / "f.part").read_bytes() == BODY[:1000]
    assert not (tmp_path / "f").exists()


def test_a_wrong_checksum_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"has sha256 {SHA256}, expected {'0' * 64}"):
        fetch(server, tmp_path / "f", sha256="0" * 64)
    with pytest.raises(InputError, match=f"has md5 {MD5}"):
        download(server.url, tmp_path / "f", md5="0" * 32)
    with pytest.raises(InputError, match="has size 300000, expected 7"):
        download(server.url, tmp_path / "f", sha256=SHA256, size=7)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_fails_at_once(server: Server, tmp_path: Path) -> None:
    server.statuses = [404, 404]
    with pytest.raises(InputError, match="answers 404"):
        fetch(server, tmp_path / "f")
    assert len(server.asked) == 1


def test_a_redirect_within_http_is_followed(server: Server, tmp_path: Path) -> None:
    server.redirects = ["/elsewhere", server.url]
    fetch(server, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY


@pytest.mark.parametrize(
    "address", ["ftp://127.0.0.1:1/data", "file:///etc/passwd", "FTP://127.0.0.1:1/d"]
)
def test_a_redirect_to_another_protocol_is_refused_at_once(
    server: Server, tmp_path: Path, address: str
) -> None:
    server.redirects = [address, address]
    with pytest.raises(InputError, match=r"(?i)" + re.escape(address)) as refused:
        fetch(server, tmp_path / "f")
    assert server.url in str(refused.value)
    assert len(server.asked) == 1
    assert not list(tmp_path.iterdir())


def test_a_redirect_may_not_leave_https() -> None:
    """A test server without a certificate cannot show it: the handler is asked."""
    redirects = _WebRedirects()
    to_plain = ("https://a.org/x", "http://a.org/y")
    with pytest.raises(InputError, match="which is not https; refused"):
        redirects.redirect_request(
            urllib.request.Request(to_plain[0]),
            io.BytesIO(),
            302,
            "Found",
            {},
            to_plain[1],
        )
    followed = redirects.redirect_request(
        urllib.request.Request(to_plain[1]), io.BytesIO(), 302, "Found", {}, to_plain[0]
    )
    assert followed is not None
    assert followed.full_url == to_plain[0]


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    fetch(server, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY


def test_no_network_is_one_readable_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(
        ("127.0.0.1", 0), http.server.BaseHTTPRequestHandler
    ) as listener:
        port = listener.server_port  # closed below: nobody listens there
    with pytest.raises(InputError, match=r"could not be fetched in 2 tries .*refused"):
        download(
            f"http://127.0.0.1:{port}/f",
            tmp_path / "f",
            sha256=SHA256,
            attempts=2,
            backoff_s=0.0,
        )
    with pytest.raises(InputError, match="neither http nor https"):
        download("file:///etc/hosts", tmp_path / "f")


def test_an_unchecked_download_says_so_and_distrusts_an_old_part(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "f.part").write_bytes(b"x" * 1000)
    with caplog.at_level(logging.WARNING):
        fetch(server, tmp_path / "f", sha256=None)
    assert (tmp_path / "f").read_bytes() == BODY
    assert "NOT CHECKED" in caplog.text
    assert SHA256 in caplog.text


def test_an_existing_file_is_verified_and_not_fetched(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(BODY)
    fetch(server, tmp_path / "f")
    (tmp_path / "f").write_bytes(BODY[:-1])
    with pytest.raises(InputError, match="delete it and run again"):
        fetch(server, tmp_path / "f")
    assert server.asked == []
    assert (tmp_path / "f").exists()
