"""Weight files are read as the library safetensors wrote them, and damage is named."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.language.checkpoints import (
    NUMPY_TYPES,
    random_tensors,
    same_bits,
    write_checkpoint_folder,
)
from tokenrec.errors import InputError
from tokenrec.language.tensor_files import (
    INDEX_FILE,
    SINGLE_FILE,
    folder_digest,
    open_tensor_files,
)
from tokenrec.language.tensor_writer import TensorSpec, write_tensor_file


def write_raw(folder: Path, header: Any, data: bytes, padding: int = 0) -> Path:
    """Write a weight file by hand; `header` is JSON text or a value."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / SINGLE_FILE
    path.write_bytes(struct.pack("<Q", len(text) + padding) + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_what_was_written(dtype: str, shards: int, tmp_path: Path) -> None:
    tensors = random_tensors("gemma3", dtype)
    files = open_tensor_files(
        write_checkpoint_folder(tmp_path, "gemma3", tensors, shards)
    )
    assert files.tensors.keys() == tensors.keys()
    assert len(files.files) == shards
    views = {name: files.view(name) for name in tensors}
    # Views outlive the object that made them.
    del files
    for name, expected in tensors.items():
        assert same_bits(views[name], expected)
        assert not views[name].flags.writeable
        assert same_bits(views[name][1:3], expected[1:3])


def test_a_view_reads_nothing_before_it_is_used(tmp_path: Path) -> None:
    # A sparse file of a tebibyte, which no machine could read.
    count = 2**38
    header = json.dumps({"a": entry(0, 4 * count, [2, count // 2])}).encode()
    path = tmp_path / SINGLE_FILE
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * count)
    view = open_tensor_files(tmp_path).view("a")
    assert view.shape == (2, count // 2)
    assert view.T[12345:12348].tolist() == [[0, 0]] * 3


def test_numbers_need_not_be_aligned(tmp_path: Path) -> None:
    data = b"\x00" + np.arange(3, dtype=np.float32).tobytes()
    header = {"b": entry(0, 1, [1], "U8"), "a": entry(1, 13, [3])}
    write_raw(tmp_path, header, data)
    assert open_tensor_files(tmp_path).view("a").tolist() == [0, 1, 2]


def test_empty_tensors_and_other_types_are_listed(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {
        "empty": np.zeros((0, 3), np.float32),
        "ids": np.arange(4),
        "x": np.ones(2, np.float32),
    }
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    files = open_tensor_files(tmp_path)
    assert files.tensors.keys() == tensors.keys()
    assert files.view("empty").shape == (0, 3)
    assert files.tensors["ids"].dtype == "I64"
    with pytest.raises(InputError, match=r"'ids' is of type I64.*F32, F16, BF16"):
        files.view("ids")


X = {"x": entry(0, 8, [2])}
DAMAGED: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / SINGLE_FILE).write_bytes(b""), "within its header"),
    (lambda folder: (folder / SINGLE_FILE).write_bytes(b"\1\0\0"), "within its header"),
    (lambda folder: write_raw(folder, X, b"", padding=9), "within its header"),
    (
        lambda folder: write_raw(folder, X, b"1234567"),
        "it has 76 bytes, and its header says 77",
    ),
    (
        lambda folder: write_raw(folder, X, b"123456789"),
        "it has 78 bytes, and its header says 77",
    ),
    (lambda folder: write_raw(folder, b"{", b""), "not JSON"),
    (lambda folder: write_raw(folder, b'{"x": "\xff"}', b""), "not JSON"),
    (lambda folder: write_raw(folder, b"[" * 100_000, b""), "not JSON"),
    (lambda folder: write_raw(folder, [], b""), "no JSON object"),
    (lambda folder: write_raw(folder, {"x": 1}, b""), "entry of 'x' is damaged"),
    (lambda folder: write_raw(folder, {"x": {}}, b""), "entry of 'x' is damaged"),
    (
        lambda folder: write_raw(folder, {"x": entry(0, 8, [2, True])}, b"12345678"),
        "entry of 'x' is damaged",
    ),
    (
        lambda folder: write_raw(folder, {"x": entry(0, 8, [-2])}, b"12345678"),
        "entry of 'x' is damaged",
    ),
    (
        lambda folder: write_raw(folder, {"x": entry(0, 8, [3])}, b"12345678"),
        r"'x' of shape \[3\] and type F32 has 8 bytes",
    ),
    (
        lambda folder: write_raw(folder, {"x": entry(4, 8, [1])}, b"12345678"),
        "does not follow",
    ),
    (
        lambda folder: write_raw(
            folder, {"x": entry(0, 8, [2]), "y": entry(4, 8, [1])}, b"12345678"
        ),
        "'y' does not follow",
    ),
    (
        lambda folder: write_raw(
            folder,
            b'{"x": %b, "x": %b}' % ((json.dumps(X["x"]).encode(),) * 2),
            b"12345678",
        ),
        "'x' twice",
    ),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGED)
def test_a_damaged_file_is_named(
    damage: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    damage(tmp_path)
    with pytest.raises(InputError, match=reason) as caught:
        open_tensor_files(tmp_path)
    assert str(tmp_path / SINGLE_FILE) in str(caught.value)


def test_any_damage_of_a_header_gives_tensors_or_a_refusal(tmp_path: Path) -> None:
    save_file(
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.int8)},
        tmp_path / SINGLE_FILE,
        metadata={"format": "pt"},
    )
    path = tmp_path / SINGLE_FILE
    whole = path.read_bytes()
    header = len(whole) - 27
    draw, refused = random.Random(0), 0
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(header)
            damaged[place] = draw.choice(
                [draw.randrange(256), *b'"{}[]:,-0129', damaged[place] ^ 1]
            )
        if draw.random() < 0.2:
            del damaged[draw.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        try:
            files = open_tensor_files(tmp_path)
            for name, tensor in files.tensors.items():
                if tensor.dtype in NUMPY_TYPES:
                    np.asarray(files.view(name)).sum()
        except InputError:
            refused += 1
    # Most damage is found; a letter of a name or of the metadata may differ.
    assert 300 < refused < 600


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tensors = random_tensors("llama3")
    return write_checkpoint_folder(tmp_path, "llama3", tensors, shards=2)


def edit_index(folder: Path, **places: Any) -> None:
    path = folder / INDEX_FILE
    index = json.loads(path.read_text())
    index["weight_map"] |= places
    path.write_text(json.dumps(index))


SHARD = "model-00001-of-00002.safetensors"


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    with pytest.raises(InputError, match=rf"{SHARD}' cannot be read: No such file"):
        open_tensor_files(sharded)
    with pytest.raises(InputError, match=rf"{SHARD}' cannot be read: No such file"):
        folder_digest(sharded)


def test_a_tensor_that_a_shard_lacks_is_named(sharded: Path) -> None:
    edit_index(sharded, other=SHARD)
    with pytest.raises(InputError, match=rf"{SHARD}' lacks 'other'"):
        open_tensor_files(sharded)


def test_a_name_in_two_shards_is_refused(sharded: Path) -> None:
    other = sharded / "model-00002-of-00002.safetensors"
    both = load_file(other) | {"lm_head.weight": np.ones(2, np.float32)}
    both |= {next(iter(load_file(sharded / SHARD))): np.ones(2, np.float32)}
    save_file(both, other)
    with pytest.raises(InputError, match=rf"{SHARD}' and .*00002.* both hold"):
        open_tensor_files(sharded)


@pytest.mark.parametrize(
    "file", ["../x", "/etc/passwd", "", "..", "a/b", "a\0", None, 3]
)
def test_an_index_names_files_of_its_folder_only(sharded: Path, file: Any) -> None:
    edit_index(sharded, other=file)
    with pytest.raises(InputError, match="is no file name"):
        open_tensor_files(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}'])
def test_a_damaged_index_is_named(sharded: Path, text: str) -> None:
    (sharded / INDEX_FILE).write_text(text)
    with pytest.raises(InputError, match=INDEX_FILE):
        open_tensor_files(sharded)


def test_a_folder_without_weights_says_what_it_has_instead(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither model.safetensors nor .*json; name"):
        open_tensor_files(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match=r"but 'pytorch_model.bin'"):
        open_tensor_files(tmp_path)
    with pytest.raises(InputError, match="neither"):
        open_tensor_files(tmp_path / "nowhere")


def test_the_digest_is_that_of_the_weight_files(sharded: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    whole = b"".join(file.read_bytes() for file in files)
    assert folder_digest(sharded) == hashlib.sha256(whole).hexdigest()
    # Other files do not count, a bit of a weight does.
    (sharded / "config.json").write_text("{}")
    (sharded / "other.safetensors").write_bytes(b"x")
    assert folder_digest(sharded) == hashlib.sha256(whole).hexdigest()
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    assert folder_digest(sharded) != hashlib.sha256(whole).hexdigest()


def test_written_files_are_what_the_library_reads(tmp_path: Path) -> None:
    arrays = [
        np.arange(3, dtype=ml_dtypes.bfloat16),
        np.arange(6, dtype=np.float32).reshape(3, 2).T,
        np.zeros((0, 2), np.float16),
        np.array([[1.5, 2]], np.float16),
    ]
    specs = [
        TensorSpec(f"t{number}", array.dtype, array.shape)
        for number, array in enumerate(arrays)
    ]
    path = tmp_path / SINGLE_FILE
    write_tensor_file(path, specs, iter(arrays))
    found = load_file(path)
    assert found.keys() == {spec.name for spec in specs}
    ours = open_tensor_files(tmp_path)
    for spec, array in zip(specs, arrays, strict=True):
        assert same_bits(found[spec.name], np.ascontiguousarray(array))
        assert same_bits(ours.view(spec.name), np.ascontiguousarray(array))
        assert ours.tensors[spec.name].begin % spec.dtype.itemsize == 0
    with pytest.raises(ValueError, match="shorter"):
        write_tensor_file(path, specs, iter(arrays[:2]))
    with pytest.raises(ValueError, match="t0"):
        write_tensor_file(path, specs, iter(arrays[1:]))
