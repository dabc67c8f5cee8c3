"""Checksums of a checkpoint: written by several processes, damaged themselves."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from tokenrec.checkpoint.integrity import (
    find_damage,
    is_verified,
    remove_checksums,
    write_checksums,
)


def checkpoint(folder: Path, files: int = 5) -> Path:
    (folder / "state").mkdir(parents=True)
    for number in range(files):
        (folder / "state" / f"f{number:03}").write_bytes(bytes([number]) * 20_000)
    return folder


def checksums(folder: Path, index: int) -> set[str]:
    return json.loads((folder / f"sums.{index}.json").read_text()).keys() - {"digest"}


def test_processes_share_the_files_by_the_listing_of_the_first(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "1")
    write_checksums(folder, 0, 2)
    assert not is_verified(folder)
    # It is not in the listing, and so no business of the second process.
    (folder / "state" / "later").write_text("x")
    write_checksums(folder, 1, 2)
    assert is_verified(folder)
    parts = [checksums(folder, index) for index in range(2)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {f"state/f{number:03}" for number in range(5)}
    (folder / "state" / "f001").write_text("x")
    (folder / "state" / "f003").unlink()
    # Another number of processes reads the checksums.
    damage = [find_damage(folder, index, 3) for index in range(3)]
    assert sorted(text for share in damage for text in share) == [
        "state/f001: 1 bytes, not 20,000",
        "state/f003: No such file or directory",
    ]


def _write(
    folder: Path, index: int, count: int, barrier: object, errors: object
) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    try:
        write_checksums(folder, index, count)
    except BaseException as error:  # noqa: BLE001 - sent to the test
        errors.put(f"process {index}: {error!r}")  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [4, 16])
def test_concurrent_processes_leave_a_checksum_for_each_file(
    tmp_path: Path, count: int
) -> None:
    context = multiprocessing.get_context("forkserver")
    # Their parent imports once what each of them would import in seconds.
    context.set_forkserver_preload([__name__])
    files = {f"state/f{number:03}" for number in range(6 + 4 * count)}
    for trial in range(40 // count):
        folder = checkpoint(tmp_path / str(trial), len(files))
        # The temporary file of a process that was killed.
        (folder / ".sums.1.json.incomplete-4711").write_text("{")
        barrier, errors = context.Barrier(count), context.Queue()
        processes = [
            context.Process(target=_write, args=(folder, i, count, barrier, errors))
            for i in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert errors.empty(), errors.get()
        assert is_verified(folder)
        assert set().union(*(checksums(folder, i) for i in range(count))) == files
        assert find_damage(folder) == []
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["sums.json", "sums.0.json"])
def test_each_flipped_bit_of_the_checksums_is_damage_and_no_crash(
    tmp_path: Path, name: str
) -> None:
    folder = checkpoint(tmp_path / "1", files=1)
    write_checksums(folder)
    path = folder / name
    whole = path.read_bytes()
    value = json.loads(whole)
    for position in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[position] ^= 1 << bit
            path.write_bytes(data)
            try:
                same = json.loads(data) == value
            except (ValueError, RecursionError):
                same = False
            # A space that becomes another space changes nothing.
            assert bool(find_damage(folder)) != same


@pytest.mark.parametrize(
    "text", [b"null", b"[]", b"3", b'{"a": 1}', b"", b"\0" * 99, b"[" * 100_000]
)
@pytest.mark.parametrize("name", ["sums.json", "sums.0.json"])
def test_other_contents_of_the_checksums_are_damage(
    tmp_path: Path, name: str, text: bytes
) -> None:
    folder = checkpoint(tmp_path / "1")
    write_checksums(folder)
    (folder / name).write_bytes(text)
    assert find_damage(folder)[0].startswith(name)


def test_checksums_of_earlier_versions_are_read(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "1")
    write_checksums(folder)
    old = json.loads((folder / "sums.0.json").read_text())
    del old["digest"]
    # They may list the temporary file of another process.
    old[".sums.1.json.incomplete-4711"] = old["state/f000"]
    remove_checksums(folder)
    assert not is_verified(folder)
    (folder / "sums.0.json").write_text(json.dumps(old))
    assert is_verified(folder)
    assert find_damage(folder) == []
    (folder / "state" / "f004").write_bytes(b"x" * 20_000)
    assert find_damage(folder) == ["state/f004: other contents than were written"]


@pytest.mark.parametrize("name", ["sums.json", "sums.0.json", "sums.1.json"])
def test_without_one_of_its_files_a_checkpoint_is_not_verified(
    tmp_path: Path, name: str
) -> None:
    folder = checkpoint(tmp_path / "1")
    for index in range(2):
        write_checksums(folder, index, 2)
    assert is_verified(folder)
    (folder / name).unlink()
    assert not is_verified(folder)
    assert find_damage(folder) == []
