"""Storage that fails while checkpoints are written and read: retried, and no damage."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from orbax.checkpoint import v1 as ocp

from tests.checkpoint.test_checkpointer import restored, saved, state_of
from tokenrec.checkpoint import checkpointer
from tokenrec.checkpoint.checkpointer import Checkpointer
from tokenrec.checkpoint.integrity import is_verified
from tokenrec.checkpoint.progress import Progress
from tokenrec.checkpoint.reader import CHECKPOINTS_FOLDER, checkpoint_steps
from tokenrec.errors import StorageError
from tokenrec.runtime import retry


class Faults:
    """Raise an error of the storage in the first calls of a function."""

    def __init__(self, function: Callable[..., Any], number: int, times: int) -> None:
        self.function = function
        self.number = number
        self.left = times

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.left:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number))
        return self.function(*args, **options)


@pytest.fixture
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_DELAYS", (0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(checkpointer, "_RETRY_SECONDS", 0.0)


@pytest.mark.usefixtures("no_delays")
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_read_that_fails_once_is_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = saved(tmp_path, 1, 2)
    faults = Faults(hashlib.file_digest, number, 1)
    monkeypatch.setattr(hashlib, "file_digest", faults)
    run = restored(tmp_path)
    assert run is not None
    assert run[0] == 2
    assert not faults.left
    # A fault that persists says nothing about the checkpoint either.
    monkeypatch.setattr(hashlib, "file_digest", Faults(faults.function, number, 99))
    with pytest.raises(StorageError, match=r"checkpoints/2/.* cannot be read"):
        restored(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


@pytest.mark.usefixtures("no_delays")
@pytest.mark.parametrize("call", range(6))
def test_a_listing_that_fails_does_not_look_like_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    saved(tmp_path, 1, 2)
    real = os.scandir
    calls = []

    def scandir(folder: Any = ".") -> Any:
        calls.append(folder)
        if len(calls) == call + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    run = restored(tmp_path)
    assert run is not None
    assert run[0] == 2
    assert len(calls) > call


@pytest.mark.usefixtures("no_delays")
def test_a_save_that_the_storage_prevents_is_made_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = ocp.save_checkpointables_async
    monkeypatch.setattr(ocp, "save_checkpointables_async", Faults(real, errno.EIO, 1))
    with Checkpointer(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, state_of(1), Progress())
        checkpoints.save(2, state_of(2), Progress())
    assert "checkpoint 1 could not be written" in capsys.readouterr().err
    assert checkpoint_steps(tmp_path / CHECKPOINTS_FOLDER) == [2]

    # The last save of a run is repeated with the state at hand.
    monkeypatch.setattr(ocp, "save_checkpointables_async", Faults(real, errno.EIO, 2))
    with Checkpointer(tmp_path, keep=3) as checkpoints:
        checkpoints.save(3, state_of(3), Progress())
        checkpoints.finish(3, state_of(3), Progress())
    assert checkpoint_steps(tmp_path / CHECKPOINTS_FOLDER) == [2, 3]

    # Not for ever.
    monkeypatch.setattr(ocp, "save_checkpointables_async", Faults(real, errno.EIO, 99))
    with Checkpointer(tmp_path, keep=3) as checkpoints:
        checkpoints.save(4, state_of(4), Progress())
        with pytest.raises(StorageError, match=r"checkpoint 4 .* checkpoints \[2, 3\]"):
            checkpoints.finish(4, state_of(4), Progress())


@pytest.mark.usefixtures("no_delays")
def test_checksums_that_the_storage_prevents_are_written_by_the_last_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Five attempts of one file, then the save counts as failed.
    faults = Faults(hashlib.file_digest, errno.EIO, 5)
    monkeypatch.setattr(hashlib, "file_digest", faults)
    with Checkpointer(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, state_of(1), Progress())
        checkpoints.finish(1, state_of(1), Progress())
    assert is_verified(tmp_path / CHECKPOINTS_FOLDER / "1")


def test_a_start_reads_one_checkpoint_of_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, *range(1, 7), keep=9)
    read = []
    real = hashlib.file_digest

    def observed(file: Any, name: str) -> Any:
        read.append(Path(file.name).relative_to(folder).parts[0])
        return real(file, name)

    monkeypatch.setattr(hashlib, "file_digest", observed)
    restored(tmp_path)
    assert set(read) == {"6"}
