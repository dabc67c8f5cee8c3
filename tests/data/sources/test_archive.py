"""Tests of unpacking: selected files, and archives that try to leave the folder."""

from __future__ import annotations

import contextlib
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tokenrec.data.sources.archive import extract
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
