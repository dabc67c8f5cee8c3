"""Paths, files and copies in object stores, on real servers of both kinds."""

import importlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.object_servers import SCHEMES, Server, object_server
from tokenrec.cli.failures import explain
from tokenrec.errors import EXIT_STORAGE, InputError, StorageError
from tokenrec.runtime import local_copy as copies
from tokenrec.runtime import log_mirror, retry
from tokenrec.runtime.files import read_json, write_json
from tokenrec.runtime.local_copy import local_copy
from tokenrec.runtime.log_mirror import LogMirror
from tokenrec.runtime.paths import (
    as_path,
    create_exclusively,
    file_size,
    is_remote,
    list_files,
    make_folder,
    move_folder,
    remove_folder,
)


@pytest.fixture(scope="module", params=SCHEMES)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with object_server(request.param, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def folder(server: Server, request: pytest.FixtureRequest) -> Path:
    return as_path(server.url(request.node.originalname))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(copies.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_path_keeps_its_url(server: Server, folder: Path) -> None:
    assert is_remote(folder)
    assert os.fspath(folder / "a" / "b") == f"{folder}/a/b"
    assert str(folder).startswith(f"{server.scheme}://")


def test_json_is_replaced_at_once(folder: Path) -> None:
    path = folder / "new" / "value.json"
    for value in (1, 2):
        write_json(path, {"value": value})
        assert read_json(path, "value", "") == {"value": value}
    assert list_files(folder) == ["new/value.json"]
    with pytest.raises(InputError, match="cannot be read"):
        read_json(folder / "none.json", "value", "")


def test_folders_are_listed_moved_and_removed(folder: Path) -> None:
    (folder / "a" / "b" / "c").write_bytes(b"1")
    (folder / "a" / "d").write_bytes(b"22")
    (folder / "aa").write_bytes(b"")
    assert list_files(folder / "a") == ["b/c", "d"]
    assert file_size(folder / "a" / "d") == 2
    moved = move_folder(folder / "a", folder / "e")
    assert list_files(folder) == ["aa", "e/b/c", "e/d"]
    assert (moved / "d").read_bytes() == b"22"
    remove_folder(moved)
    remove_folder(moved)
    assert list_files(folder) == ["aa"]


def test_what_another_client_wrote_is_seen_at_once(
    server: Server, folder: Path
) -> None:
    from tests.object_servers import _client

    (folder / "a").write_bytes(b"1")
    assert list_files(folder) == ["a"]
    _client(server.scheme).pipe_file(f"{folder}/b", b"2")
    assert list_files(folder) == ["a", "b"]
    assert [path.name for path in folder.glob("*")] == ["a", "b"]


def test_of_many_creators_one_succeeds(folder: Path) -> None:
    created: list[int] = []

    def create(number: int) -> None:
        if create_exclusively(folder / "lease-1.json", f"{number}".encode()):
            created.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(created) == 1
    assert (folder / "lease-1.json").read_text() == str(created[0])


def test_a_bucket_is_not_made(server: Server) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-bucket"):
        make_folder(as_path(f"{server.scheme}://no-such-bucket/run"))


def test_a_copy_is_made_once_and_again_when_the_objects_change(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a" / "b").write_bytes(b"one")
    (folder / "c").write_bytes(b"two")
    copy = local_copy(folder)
    assert list_files(copy) == [".lock", "a/b", "c"]
    assert "downloading 2 files" in capsys.readouterr().err
    assert local_copy(str(folder)) == copy
    assert capsys.readouterr().err == ""
    # A file that was lost or cut off is fetched again, and no other one.
    (copy / "c").write_bytes(b"t")
    assert local_copy(folder) == copy
    assert "downloading 1 files" in capsys.readouterr().err
    assert (copy / "c").read_bytes() == b"two"
    # Of equal size: the store's version tells them apart.
    (folder / "c").write_bytes(b"TWO")
    other = local_copy(folder)
    assert other != copy
    assert (other / "c").read_bytes() == b"TWO"


def test_a_single_object_is_copied(folder: Path) -> None:
    (folder / "ids.parquet").write_bytes(b"ids")
    (folder / "ids.parquet.more").write_bytes(b"other")
    copy = local_copy(folder / "ids.parquet")
    assert copy.name == "ids.parquet"
    assert copy.read_bytes() == b"ids"


def test_an_empty_place_is_no_data_set(folder: Path) -> None:
    with pytest.raises(InputError, match="holds no file"):
        local_copy(folder / "none")


def test_an_interrupted_copy_leaves_no_file_under_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (folder / name).write_bytes(b"x" * 100)
    check = copies._check

    def stop_at_b(source: Path, *rest: object) -> None:
        if source.name == "b":
            raise KeyboardInterrupt
        check(source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(copies, "_check", stop_at_b)
    with pytest.raises(KeyboardInterrupt):
        local_copy(folder)
    partial = next(copies.cache_folder().iterdir())
    assert list_files(partial) == [".lock", "a"]
    monkeypatch.setattr(copies, "_check", check)
    assert list_files(local_copy(folder)) == [".lock", "a", "b", "c"]


def test_logs_are_uploaded_when_asked_and_at_the_end(folder: Path) -> None:
    mirror = LogMirror(folder)
    log = mirror.folder / "metrics.jsonl"
    log.write_text("1\n")
    assert list_files(folder) == []
    mirror.sync()
    assert (folder / "metrics.jsonl").read_text() == "1\n"
    (mirror.folder / "tensorboard").mkdir()
    (mirror.folder / "tensorboard" / "events").write_bytes(b"e")
    with log.open("a") as file:
        file.write("2\n")
    mirror.close()
    mirror.close()
    assert list_files(folder) == ["metrics.jsonl", "tensorboard/events"]
    assert not mirror.folder.exists()
    # Another start of the run continues the log.
    again = LogMirror(folder)
    assert (again.folder / "metrics.jsonl").read_text() == "1\n2\n"
    again.close()


def test_logs_are_uploaded_in_between(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_mirror, "UPLOAD_SECONDS", 0.05)
    mirror = LogMirror(folder)
    (mirror.folder / "metrics.jsonl").write_text("1\n")
    # Without an end of its own: a test that hangs here shows that nothing is uploaded.
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.05)
    mirror.close()


def test_a_server_that_is_gone_is_a_fault_of_the_storage(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_DELAYS", (0.0,))
    # The clients try again as well, with pauses that grow.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    (tmp_path / "server").mkdir()
    with object_server(server.scheme, tmp_path / "server") as other:
        path = as_path(other.url("value.json"))
        write_json(path, {})
        if server.scheme == "gs":
            gcsfs_retry = importlib.import_module("gcsfs.retry")
            monkeypatch.setattr(gcsfs_retry, "min", lambda *_: 0, raising=False)
        other.process.kill()
        other.process.wait()
        with pytest.raises(StorageError, match=r"value\.json"):
            retry.retry(path.read_bytes, path)
        with pytest.raises(Exception, match="onnect") as raw:
            path.read_bytes()
        explained = explain(raw.value)
        assert explained is not None
        assert explained[1] == EXIT_STORAGE
