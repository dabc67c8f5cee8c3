"""Paths of local folders and object stores."""

import os
from pathlib import Path

import pytest

from tokenrec.cli.main import main
from tokenrec.errors import InputError
from tokenrec.runtime import paths
from tokenrec.runtime.paths import (
    absolute,
    as_path,
    is_remote,
    list_files,
    local_path,
    move_folder,
    remove_folder,
)


@pytest.mark.parametrize("text", ["runs/a", "/runs/a", "runs/lr=[1,2]", "a:b", "lr:/x"])
def test_a_local_path_stays_what_it_is(text: str) -> None:
    path = as_path(text)
    assert path == Path(text)
    assert type(path) is type(Path())
    assert not is_remote(path)
    assert absolute(text) == Path.cwd() / text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gs:/bucket/run", "names no bucket"),
        ("gs://", "names no bucket"),
        ("s3:///run", "names no bucket"),
        ("http://host/run", "is a URL of 'http'"),
        ("az://container/run", "is a URL of 'az'"),
        ("file:///run", "is a URL of 'file'"),
    ],
)
def test_other_urls_are_no_local_folders(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_path(text)


def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda package: None)
    paths._prepare_store.cache_clear()
    with pytest.raises(InputError, match=r"need the package s3fs.*'\.\[s3\]'"):
        as_path("s3://bucket/run")
    with pytest.raises(InputError, match=r"need the package gcsfs.*'\.\[gcs\]'"):
        as_path("gs://bucket/run")
    paths._prepare_store.cache_clear()


@pytest.mark.parametrize("text", ["gs://bucket/data", "gs:/bucket/data", "http://x/y"])
def test_urls_are_refused_where_only_local_paths_will_do(text: str) -> None:
    with pytest.raises(InputError, match=r"--out='.*' must be a local path"):
        local_path(text, "--out")


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "synthetic", "--rows=100", "--out=gs://bucket/data"],
        ["semantic-ids", "--data=data", "--out=s3://bucket/ids"],
        ["study", "--config=x", "--out=gs://bucket/study"],
        ["report", "--study=gs://bucket/study", "--out=page"],
        ["train", "--config=synthetic", "--workdir=gs:/bucket/run"],
        ["evaluate", "--workdir=ftp://bucket/run", "--split=test"],
    ],
)
def test_the_command_line_makes_no_folder_named_by_a_scheme(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        raise SystemExit(main(words))
    assert end.value.code == 2
    assert "://" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_folders_are_listed_moved_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "c").write_text("1")
    (folder / "d").write_text("22")
    assert list_files(folder) == ["b/c", "d"]
    assert list_files(tmp_path / "none") == []
    moved = move_folder(folder, tmp_path / "e")
    assert list_files(moved) == ["b/c", "d"]
    assert not folder.exists()
    remove_folder(moved)
    remove_folder(moved)
    assert list_files(tmp_path) == []
