"""An artifact is refused unless it is whole, and names nothing outside of itself."""

import json
import shutil

import pytest

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


def test_a_flipped_byte_in_any_file_is_found(copy):
    for name in (*read_artifact(copy).manifest["files"], MANIFEST_FILE):
        path = copy / name
        data = bytearray(path.read_bytes())
        if not data:
            continue
        data[len(data) // 2] ^= 1
        whole = path.read_bytes()
        path.write_bytes(data)
        with pytest.raises(InputError, match="artifact"):
            read_artifact(copy)
        path.write_bytes(whole)
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
