"""Files that are replaced in one step, or not at all."""

import errno
import os
from pathlib import Path

import pytest

from tokenrec.runtime.files import write_json, write_text_atomically


def test_a_write_that_fails_in_the_middle_leaves_the_old_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    whole = path.read_bytes()
    write = Path.write_text

    def half(self: Path, text: str, **options: str) -> int:
        write(self, text[: len(text) // 2], **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2, "b": [3, 4]})
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("fsync"))
    replace = Path.replace

    def observed(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", observed)
    write_text_atomically(tmp_path / "file", "text")
    assert done == ["fsync", "rename"]
