"""Transient faults of the storage: tried again, and then an error of their own."""

import errno
import os
from pathlib import Path

import pytest

from tokenrec.errors import EXIT_STORAGE, InputError, StorageError
from tokenrec.runtime import retry as retry_module
from tokenrec.runtime.retry import is_transient, retry


class Failing:
    """Fail the first `failures` calls with an error number, then return 7."""

    def __init__(self, failures: int, number: int) -> None:
        self.failures = failures
        self.number = number
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.failures:
            raise OSError(self.number, os.strerror(self.number))
        return 7


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "_DELAYS", (0.0, 0.0, 0.0, 0.0))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_transient_fault_is_tried_again_and_said(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    action = Failing(2, number)
    assert retry(action, Path("/disk/file")) == 7
    assert action.calls == 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith(f"tokenrec: '/disk/file': {os.strerror(number)}; trying")


def test_a_fault_that_persists_is_a_storage_error_that_names_the_path() -> None:
    action = Failing(99, errno.EIO)
    with pytest.raises(StorageError, match=r"'/disk/file' .* 5 times: Input/output"):
        retry(action, Path("/disk/file"))
    assert action.calls == 5


def test_a_fault_that_was_tried_again_inside_is_not_tried_again_outside() -> None:
    action = Failing(99, errno.EIO)
    with pytest.raises(StorageError, match="5 times"):
        retry(lambda: retry(action, Path("/disk/file")), Path("/disk"))
    assert action.calls == 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOENT, errno.EACCES])
def test_other_errors_are_not_tried_again(number: int) -> None:
    action = Failing(1, number)
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        retry(action, Path("/disk/file"))
    assert not isinstance(raised.value, StorageError)
    assert action.calls == 1


def test_errors_of_libraries_are_told_apart_by_their_texts() -> None:
    assert is_transient(ValueError("DATA_LOSS: Error reading: Input/output error [5]"))
    assert is_transient(RuntimeError("UNAVAILABLE: the bucket answered 503"))
    assert not is_transient(ValueError("DATA_LOSS: checksum differs"))
    assert not is_transient(InputError("the file: Input/output error"))


def test_the_command_line_ends_with_the_code_that_schedulers_restart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenrec.cli import main as command_line

    def failing(argv: list[str]) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/disk/file")

    monkeypatch.setattr(command_line, "_run", failing)
    assert command_line.main(["describe"]) == EXIT_STORAGE
    assert "'/disk/file'" in capsys.readouterr().err
