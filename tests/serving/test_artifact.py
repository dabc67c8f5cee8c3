"""An artifact is refused unless it is whole, and names nothing outside of itself."""

import json
import shutil

import numpy as np
import pytest

from benchmarks.serving_damage import open_each
from tokenrec.errors import InputError
from tokenrec.serving.artifact import (
    MANIFEST_FILE,
    digest_manifest,
    is_artifact,
    read_artifact,
)


@pytest.fixture
def copy(artifact, tmp_path):
    return shutil.copytree(artifact, tmp_path / "model")


def change(folder, **fields):
    """Change fields of the manifest, with a digest that fits."""
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_text()) | fields
    manifest["digest"] = digest_manifest(manifest)
    path.write_text(json.dumps(manifest))


def test_a_whole_artifact_opens(artifact):
    opened = read_artifact(artifact)
    assert is_artifact(artifact)
    assert opened.digest == opened.manifest["digest"]
    on_disk = {
        path.relative_to(artifact).as_posix()
        for path in artifact.rglob("*")
        if path.is_file()
    }
    assert on_disk == {*opened.manifest["files"], MANIFEST_FILE}


def test_a_file_that_is_flipped_truncated_or_missing_is_named(copy):
    files = len(read_artifact(copy).manifest["files"])
    rows = list(open_each(copy, np.random.default_rng(0)))
    assert [row["damage"] for row in rows] == ["flipped", "truncated", "missing"]
    for row in rows:
        # Less the files that are empty; and the manifest.
        assert files - 3 < row["files"] <= files + 1
        assert row["ends"] == f"{row['files']} refused, named"
    read_artifact(copy)


def test_sizes_are_checked_before_any_digest(copy):
    names = sorted(read_artifact(copy).manifest["files"])
    (copy / names[-1]).unlink()
    data = (copy / names[0]).read_bytes()
    (copy / names[0]).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(InputError, match="is missing"):
        read_artifact(copy)


def test_a_missing_or_longer_file_is_named(copy):
    path = copy / "items/ids.npy"
    data = path.read_bytes()
    path.write_bytes(data + b"0")
    with pytest.raises(InputError, match=f"has {len(data) + 1} bytes, not {len(data)}"):
        read_artifact(copy)
    path.unlink()
    with pytest.raises(InputError, match=r"ids\.npy' is missing"):
        read_artifact(copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/hosts", "a/../../b", "a\\b", ""])
def test_a_file_outside_of_the_folder_is_refused(copy, name):
    files = read_artifact(copy).manifest["files"]
    change(copy, files=files | {name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(InputError, match="does not lie in it"):
        read_artifact(copy)


def test_a_link_is_refused(copy, tmp_path):
    (copy / "items").rename(tmp_path / "elsewhere")
    (copy / "items").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="items' is a link"):
        read_artifact(copy)


def test_the_folder_itself_may_be_a_link(artifact, tmp_path):
    (tmp_path / "current").symlink_to(artifact)
    assert read_artifact(tmp_path / "current").path == artifact.resolve()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 3}, "format version 3, and this version reads 1 and 2"),
        ({"format": "zip"}, "is not that of an artifact"),
        ({"events": "6"}, "'events' must be a whole number"),
        ({"schema": {"features": 3}}, "'features' is 3"),
        ({"files": {"a": 1}}, r"files\['a'\] is 1"),
    ],
)
def test_a_wrong_manifest_is_named(copy, fields, message):
    change(copy, **fields)
    with pytest.raises(InputError, match=message):
        read_artifact(copy)


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path):
    with pytest.raises(InputError, match="make one with `tokenrec export`"):
        read_artifact(tmp_path)
