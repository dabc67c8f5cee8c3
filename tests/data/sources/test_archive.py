"""Tests of unpacking: selected files, and archives that try to leave the folder."""

from __future__ import annotations

import contextlib
import gzip
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tokenrec.data.sources.archive import MAX_HEADER_BYTES, extract
from tokenrec.errors import InputError

# It must not compress: the tests cut archives at half of their length.
BODY = np.random.default_rng(0).bytes(300_000)


def tar_of(
    path: Path,
    *members: tuple[str, bytes],
    change: Callable[[tarfile.TarInfo], None] | None = None,
) -> Path:
    with tarfile.open(path, "w:gz") as bundle:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if change:
                change(info)
            bundle.addfile(info, io.BytesIO(content))
    return path


def test_extract_strips_folders_and_takes_only_what_is_wanted(tmp_path: Path) -> None:
    archive = tar_of(
        tmp_path / "a.tar.gz",
        ("top/data/a.csv", b"a"),
        ("top/data/b.csv", b"b"),
        ("top/c.py", b"c"),
    )
    paths = extract(
        archive,
        tmp_path / "out",
        max_bytes=10,
        strip=1,
        wanted=lambda p: p.suffix == ".csv",
    )
    assert paths == [tmp_path / "out/data/a.csv", tmp_path / "out/data/b.csv"]
    assert [p.read_bytes() for p in paths] == [b"a", b"b"]
    assert not (tmp_path / "out/c.py").exists()


def test_extract_reads_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as bundle:
        bundle.writestr("d/a.txt", "hello")
    assert extract(tmp_path / "a.zip", tmp_path / "out", max_bytes=10) == [
        tmp_path / "out/d/a.txt"
    ]
    assert (tmp_path / "out/d/a.txt").read_text() == "hello"


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/../../evil", "C:\\evil", "a\\..\\evil"]
)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    tar_of(tmp_path / "a.tar.gz", ("good", b"g"), (name, b"e"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as bundle:
        bundle.writestr(name, "e")
    for archive in ("a.tar.gz", "a.zip"):
        with pytest.raises(InputError, match="leaves the folder"):
            extract(tmp_path / archive, tmp_path / "out", max_bytes=10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz", "a.zip"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname = kind, "good"

    archive = tar_of(tmp_path / "a.tar.gz", ("link", b""), change=change)
    with pytest.raises(InputError, match="a link or a device"):
        extract(archive, tmp_path / "out", max_bytes=10)
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as bundle:
        bundle.writestr(info, "/etc/passwd")
    with pytest.raises(InputError, match="a link or a device"):
        extract(tmp_path / "a.zip", tmp_path / "out", max_bytes=100)


def test_an_archive_that_unpacks_to_too_much_is_stopped(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "a.tar.gz", ("a", bytes(600)), ("b", bytes(600)))
    with pytest.raises(InputError, match="more than max_bytes=1000"):
        extract(archive, tmp_path / "out", max_bytes=1000)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]


def header(kind: bytes, body: bytes, name: str = "h") -> bytes:
    """A member of a tar file as bytes, its header included."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)


def attribute(length: int, name: str = "comment") -> bytes:
    """An attribute of a pax header with a value of `length` bytes."""
    rest = b" " + name.encode() + b"=" + b"x" * length + b"\n"
    size = len(rest)
    while len(str(size)) + len(rest) != size:
        size = len(str(size)) + len(rest)
    return str(size).encode() + rest


SMALL = header(tarfile.REGTYPE, b"content", "a")
# What a gzip of a few kilobytes unpacks to gigabytes of: here only as large as it takes
# to be refused.
HUGE = {
    "attributes": header(tarfile.XHDTYPE, attribute(MAX_HEADER_BYTES)) + SMALL,
    "global attributes": header(tarfile.XGLTYPE, attribute(MAX_HEADER_BYTES)) + SMALL,
    "many global attributes": b"".join(
        header(tarfile.XGLTYPE, attribute(MAX_HEADER_BYTES // 2, f"key{i}"))
        + header(tarfile.REGTYPE, b"", f"a{i}")
        for i in range(4)
    ),
    "a long name": header(tarfile.GNUTYPE_LONGNAME, b"n" * (MAX_HEADER_BYTES + 1))
    + SMALL,
    "a long link": header(tarfile.GNUTYPE_LONGLINK, b"n" * (MAX_HEADER_BYTES + 1))
    + SMALL,
    "a sparse file": header(tarfile.GNUTYPE_SPARSE, b"", "a"),
    "a sparse file by its attributes": header(
        tarfile.XHDTYPE,
        b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n24 GNU.sparse.name=a.txt\n",
    )
    + header(tarfile.REGTYPE, b"1\n0\n0\n"),
}


@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("compressed", [True, False])
def test_a_header_that_would_fill_memory_is_refused(
    tmp_path: Path, name: str, compressed: bool
) -> None:
    content = HUGE[name] + bytes(1024)
    archive = tmp_path / "a.tar"
    archive.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(InputError, match=r"names or attributes of \d+|a sparse file"):
        extract(archive, tmp_path / "out", max_bytes=10**6)
    assert not (tmp_path / "out").exists()


def test_ordinary_attributes_and_long_names_are_read(tmp_path: Path) -> None:
    long = "/".join(["folder" * 20] * 10)
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        archive = tmp_path / f"{number}.tar.gz"
        with tarfile.open(archive, "w:gz", format=form) as bundle:
            for name in (f"{long}/a", f"{long}/b"):
                info = tarfile.TarInfo(name)
                info.size = 3
                info.pax_headers = {"comment": "c" * 5000}
                bundle.addfile(info, io.BytesIO(b"abc"))
        paths = extract(archive, tmp_path / f"out{number}", max_bytes=100)
        assert [path.read_bytes() for path in paths] == [b"abc", b"abc"]


def test_members_that_were_read_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their attributes would add up over any number of members."""
    archive = tar_of(tmp_path / "a.tar.gz", *((f"{i}", b"x") for i in range(50)))
    kept: list[int] = []
    usual = tarfile.TarFile.extractfile

    def extractfile(self: tarfile.TarFile, member: tarfile.TarInfo) -> object:
        kept.append(len(self.members))  # type: ignore[attr-defined]
        return usual(self, member)

    monkeypatch.setattr(tarfile.TarFile, "extractfile", extractfile)
    assert len(extract(archive, tmp_path / "out", max_bytes=1000)) == 50
    assert set(kept) == {0}


def test_a_truncated_archive_leaves_no_folder(tmp_path: Path) -> None:
    whole = tar_of(tmp_path / "a.tar.gz", ("a", BODY)).read_bytes()
    for kept in (len(whole) // 2, 1, 0):
        (tmp_path / "cut.tar.gz").write_bytes(whole[:kept])
        with pytest.raises(InputError, match="cannot be read"):
            extract(tmp_path / "cut.tar.gz", tmp_path / "out", max_bytes=10**6)
        assert not (tmp_path / "out").exists()


def test_an_interrupted_extraction_does_not_look_whole_and_can_be_repeated(
    tmp_path: Path,
) -> None:
    archive = tar_of(tmp_path / "a.tar.gz", ("a", b"1"), ("b", b"2"))

    def interrupt(path: object) -> bool:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        extract(archive, tmp_path / "out", max_bytes=10, wanted=interrupt)
    assert not (tmp_path / "out").exists()
    assert len(extract(archive, tmp_path / "out", max_bytes=10)) == 2
    with pytest.raises(InputError, match="exists; delete it"):
        extract(archive, tmp_path / "out", max_bytes=10)
