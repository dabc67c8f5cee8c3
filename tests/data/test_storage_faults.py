"""A storage fault while a data set is read: tried again, and never called damage.

The faults of shards are real: their file handle is replaced by one whose reads fail
with EIO. Others come from functions that are replaced.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import resource
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.fuzz_targets import make_targets
from tokenrec.config import Config
from tokenrec.config.json_format import read_config, to_json
from tokenrec.data import records
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.preparation.folder import file_checksums
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.semantic_id_file import load_semantic_ids
from tokenrec.data.source import Provenance
from tokenrec.data.sources.archive import extract
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.data.sources.tabular import read_csv, read_parquet
from tokenrec.data.tokenizer import load_tokenizer
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.errors import InputError, StorageError
from tokenrec.runtime import retry as retry_module
from tokenrec.runtime.files import RetryingFile, read_json, write_json

ATTEMPTS = 5
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "_DELAYS", (0.0,) * (ATTEMPTS - 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults")
    make_targets(out)
    return out


@pytest.fixture
def data(folder: Path) -> Dataset:
    return open_dataset(folder / "data")


def break_handles(path: Path) -> int:
    """Make reads of this process's open handles of a file fail with EIO."""
    # Reading the memory of a process where nothing is mapped is an I/O error.
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    count = 0
    try:
        for handle in os.listdir("/proc/self/fd"):
            link = f"/proc/self/fd/{handle}"
            if os.path.islink(link) and os.readlink(link) == os.fspath(path):
                os.dup2(memory, int(handle))
                count += 1
    finally:
        os.close(memory)
    return count


class BreakingReader:
    """An ArrayRecordReader whose file fails at the first `failures` reads.

    Attributes:
      failures: reads that are still to fail, of all readers.
    """

    failures = 0

    def __init__(self, path: str, options: str) -> None:
        self._path = path
        self._reader = _READER(path, options)

    def read(self, begin: int, end: int) -> list[bytes]:
        if BreakingReader.failures:
            BreakingReader.failures -= 1
            assert break_handles(Path(self._path)) == 1
        return self._reader.read(begin, end)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


_READER = records.ArrayRecordReader


@LINUX
def test_a_shard_is_read_again_after_an_io_error(
    data: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = data.load("train")
    monkeypatch.setattr(records, "ArrayRecordReader", BreakingReader)
    monkeypatch.setattr(BreakingReader, "failures", 2)
    found = data.load("train")
    assert BreakingReader.failures == 0
    for name, array in vars(expected).items():
        np.testing.assert_array_equal(vars(found)[name], array)
    assert capsys.readouterr().err.count("Input/output error") == 2


@LINUX
def test_a_shard_that_stays_unreadable_is_a_storage_fault_that_names_it(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "ArrayRecordReader", BreakingReader)
    monkeypatch.setattr(BreakingReader, "failures", ATTEMPTS)
    with pytest.raises(StorageError, match=r"train.*Input/output error") as fault:
        data.load("train")
    assert "prepare" not in str(fault.value)
    assert BreakingReader.failures == 0
    data.load("train")


@pytest.fixture
def no_more_files() -> Iterator[Callable[[], None]]:
    """A function after which this process can open no file."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []

    def use_up() -> None:
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, before[1]))
        while True:
            try:
                held.append(os.dup(0))
            except OSError:
                return

    try:
        yield use_up
    finally:
        for handle in held:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@LINUX
def test_a_limit_of_open_files_is_not_damage(
    folder: Path, data: Dataset, no_more_files: Callable[[], None]
) -> None:
    data.load("train")
    problems = []
    no_more_files()
    for read in (
        lambda: data.load("train"),
        lambda: data.check_shards("valid"),
        lambda: open_dataset(folder / "data"),
        lambda: load_vocabulary(folder / "data", "tab"),
    ):
        try:
            read()
        except InputError as error:
            problems.append(str(error))
    assert len(problems) == 4
    for problem in problems:
        assert "Too many open files" in problem
        assert "ulimit -n" in problem
        assert "prepare" not in problem


class FailingCalls:
    """Let the first `failures` calls of a function fail with an error number."""

    def __init__(self, function: Callable[..., Any], failures: int, code: int) -> None:
        self.function = function
        self.failures = failures
        self.code = code
        self.failed = 0

    def __call__(self, *args: Any, **named: Any) -> Any:
        if self.failed < self.failures:
            self.failed += 1
            raise OSError(self.code, os.strerror(self.code))
        return self.function(*args, **named)

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        return lambda *args, **named: self(instance, *args, **named)


def make_files(folder: Path, out: Path) -> None:
    """Files of every kind that is read."""
    (out / "config.json").write_text(to_json(Config()))
    (out / "some.json").write_text("[1]")
    (out / "log.csv").write_text("a\n1\n")
    pq.write_table(pa.table({"a": [1]}), out / "log.parquet")
    pq.write_table(
        pa.table(
            {
                "item_id": pa.array([1, 2]),
                "codes": pa.array([[0], [1]], pa.list_(pa.int32())),
            }
        ),
        out / "ids.parquet",
    )


# What is read -> (owner and name of the function that fails, what reads).
READS: dict[str, tuple[Any, str, Callable[[Path, Path], Any]]] = {
    "digest of a file": (Path, "open", lambda f, out: open_dataset(f / "data")),
    "tokenrec.json": (Path, "read_bytes", lambda f, out: open_dataset(f / "data")),
    "look-up": (Path, "stat", lambda f, out: open_dataset(f / "data")),
    "array": (np, "load", lambda f, out: open_dataset(f / "data")),
    "vocabulary": (pq, "read_table", lambda f, out: load_vocabulary(f / "data", "tab")),
    "tokenizer": (Path, "open", lambda f, out: load_tokenizer(f / "data")),
    "semantic ids": (
        pq,
        "read_table",
        lambda f, out: load_semantic_ids(out / "ids.parquet"),
    ),
    "config": (Path, "read_bytes", lambda f, out: read_config(out / "config.json")),
    "JSON": (Path, "read_bytes", lambda f, out: read_json(out / "some.json", "x", "y")),
    "checksums": (
        Path,
        "open",
        lambda f, out: file_checksums(Provenance("", "", "", (out / "log.csv",))),
    ),
    "CSV": (
        io,
        "FileIO",
        lambda f, out: list(read_csv(out / "log.csv", {"a": pa.int64()})),
    ),
    "Parquet": (
        io,
        "FileIO",
        lambda f, out: list(read_parquet(out / "log.parquet", {"a": pa.int64()})),
    ),
}


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("kind", READS)
def test_a_fault_that_passes_is_survived_and_one_that_stays_is_no_input_error(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    code: int,
) -> None:
    make_files(folder, tmp_path)
    owner, name, read = READS[kind]
    usual = getattr(owner, name)
    for failures in (2, 10**9):
        failing = FailingCalls(usual, failures, code)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            if failures == 2:
                read(folder, tmp_path)
            else:
                with pytest.raises(StorageError, match=os.strerror(code)) as fault:
                    read(folder, tmp_path)
                assert "prepare" not in str(fault.value)
                assert "/" in str(fault.value)
        assert failing.failed == (2 if failures == 2 else ATTEMPTS)


class FlakyFile(io.FileIO):
    """A file of which every second read fails, and a handle that failed never recovers.

    Attributes:
      reads: reads of all such files.
    """

    reads = 0

    def readinto(self, buffer: Any) -> int | None:
        if getattr(self, "stale", False):
            raise OSError(errno.ESTALE, "Stale file handle")
        FlakyFile.reads += 1
        if FlakyFile.reads % 2 == 0:
            self.stale = True
            raise OSError(errno.EIO, "Input/output error")
        return super().readinto(buffer)


def test_a_source_is_read_through_faults_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).integers(0, 10**9, 200_000)
    pq.write_table(pa.table({"a": values}), tmp_path / "a.parquet", row_group_size=9999)
    (tmp_path / "a.csv").write_text("a\n" + "".join(f"{v}\n" for v in values))
    (tmp_path / "a.csv.gz").write_bytes(
        gzip.compress((tmp_path / "a.csv").read_bytes())
    )
    monkeypatch.setattr(io, "FileIO", FlakyFile)
    for name, reader in (
        ("a.parquet", read_parquet),
        ("a.csv", read_csv),
        ("a.csv.gz", read_csv),
    ):
        before = FlakyFile.reads
        batches = reader(tmp_path / name, {"a": pa.int64()})
        found = np.concatenate([batch.column(0).to_numpy() for batch in batches])
        np.testing.assert_array_equal(found, values)
        assert FlakyFile.reads - before >= 2, "nothing failed"


def test_a_retrying_file_reads_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(100)))
    with RetryingFile(path) as file:
        assert file.read(3) == bytes([0, 1, 2])
        assert file.seek(10, os.SEEK_CUR) == 13
        assert file.read(1) == bytes([13])
        assert file.seek(-2, os.SEEK_END) == 98
        assert file.read() == bytes([98, 99])
        assert file.read(1) == b""
        assert file.tell() == 100
    assert file.closed
    with pytest.raises(FileNotFoundError):
        RetryingFile(tmp_path / "absent")


def test_an_archive_on_a_disk_that_fails_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "content").write_bytes(os.urandom(10_000))
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as bundle:
        bundle.add(tmp_path / "content", "content")

    class Failing(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(io, "FileIO", Failing)
        with pytest.raises(StorageError, match=r"a\.tar.*Input/output error") as fault:
            extract(archive, tmp_path / "out", max_bytes=10**6)
    assert "fetch it again" not in str(fault.value)
    assert not (tmp_path / "out").exists()
    assert extract(archive, tmp_path / "out", max_bytes=10**6)


def test_a_file_is_written_through_a_fault_that_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})
    for failures in (2, 10**9):
        failing = FailingCalls(os.fsync, failures, errno.EIO)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            if failures == 2:
                write_json(path, {"new": 2})
            else:
                with pytest.raises(StorageError, match=r"value\.json"):
                    write_json(path, {"newer": 3})
        assert read_json(path, "x", "y") == {"new": 2}
        assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


class FailingWriter:
    """An ArrayRecordWriter on a disk that fails."""

    def __init__(self, path: str, options: str) -> None:
        pass

    def write(self, record: bytes) -> None:
        raise RuntimeError("write() failed: Input/output error; writing x.shard-00000")

    def close(self) -> None:
        pass


def test_a_shard_that_cannot_be_written_is_a_storage_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "ArrayRecordWriter", FailingWriter)
    with pytest.raises(StorageError, match=r"set.*Input/output error"):
        prepare(SyntheticSource(500, users=5, items=5), tmp_path / "set")
    assert not list(tmp_path.iterdir())
