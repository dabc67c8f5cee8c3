"""Checkpoints on disk: which ones stay, and how damaged ones are found."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenrec.checkpoint.checkpointer import Checkpointer, Progress
from tokenrec.checkpoint.integrity import find_damage, write_checksums
from tokenrec.checkpoint.reader import CHECKPOINTS_FOLDER, CheckpointReader
from tokenrec.errors import InputError
from tokenrec.ops.tables.lookup import RowsState
from tokenrec.state import TrainState

# Elements of the weights: their file is longer than all others.
SIZE = 2_000


def state_of(number: float, *, size: int = SIZE) -> TrainState:
    weights = jnp.arange(float(size)) + number
    rows = {"16": RowsState(jnp.full(8, number))}
    return TrainState(
        jnp.int32(number),
        {"w": weights},
        {"16": jnp.ones((8, 2)) * number},
        {"dense": (weights,), "rows": rows},
    )


def abstract(size: int = SIZE) -> TrainState:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        state_of(0, size=size),
    )


def saved(workdir: Path, *steps: int, **options: int) -> Path:
    with Checkpointer(
        workdir, **({"keep": 3} | options), config={"seed": 7}
    ) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), Progress(), None)
    return workdir / CHECKPOINTS_FOLDER


def equal(a: TrainState, b: TrainState) -> bool:
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def restored(workdir: Path) -> tuple[int, TrainState, Progress] | None:
    with Checkpointer(workdir, keep=3) as checkpoints:
        return checkpoints.restore(abstract())


def files_of(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.match("sums.*.json")
    )


def test_the_latest_and_every_kth_checkpoint_stay_with_config_and_versions(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path, *range(1, 8), keep=2, keep_every=3)
    with CheckpointReader(tmp_path) as checkpoints:
        assert checkpoints.steps == [3, 6, 7]
    beside = json.loads((folder / "7" / "_CHECKPOINT_METADATA").read_text())[
        "custom_metadata"
    ]
    assert beside["config"] == {"seed": 7}
    assert beside["versions"]["jax"] == jax.__version__


def test_progress_comes_back_with_the_state(tmp_path: Path) -> None:
    progress = Progress(best=0.5, best_step=2, waited=1, skipped=3, assessed=False)
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        assert checkpoints.restore(abstract()) is None
        checkpoints.save(4, state_of(4), progress, None)
    run = restored(tmp_path)
    assert run is not None
    assert (run[0], run[2]) == (4, progress)
    assert equal(run[1], state_of(4))


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_damage_to_any_file_sets_the_latest_aside_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    folder = saved(tmp_path, 1)
    for count in range(len(files_of(folder / "1"))):
        saved(tmp_path, 2)
        victim = files_of(folder / "2")[count]
        if harm == "flip":
            data = bytearray(victim.read_bytes())
            data[len(data) // 2] ^= 4
            victim.write_bytes(data)
        elif harm == "truncate":
            victim.write_bytes(victim.read_bytes()[:-1])
        else:
            victim.unlink()
        with (
            pytest.raises(InputError, match=r"checkpoint 2 .* is damaged: "),
            CheckpointReader(tmp_path) as checkpoints,
        ):
            checkpoints.load_state("latest", abstract())
        run = restored(tmp_path)
        assert run is not None
        assert run[0] == 1
        name = victim.relative_to(folder / "2").as_posix()
        assert f"checkpoint 2 is damaged: {name}" in capsys.readouterr().err
        assert len(sorted(folder.glob("damaged-2*"))) == count + 1


def test_a_run_without_an_intact_checkpoint_is_refused_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path, 1, 2)
    for step in (1, 2):
        (folder / str(step) / "state" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(
        InputError, match="no intact checkpoint: 2 damaged ones were set aside"
    ):
        restored(tmp_path)
    assert {path.name for path in folder.iterdir()} == {"damaged-1", "damaged-2"}


def test_an_interrupted_save_is_deleted(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    partial = folder / "2.orbax-checkpoint-tmp"
    (partial / "state").mkdir(parents=True)
    run = restored(tmp_path)
    assert run is not None
    assert run[0] == 1
    assert not partial.exists()


def test_a_checkpoint_without_checksums_is_used(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path, 1)
    (folder / "1" / "sums.0.json").unlink()
    run = restored(tmp_path)
    assert run is not None
    assert run[0] == 1


def test_a_checkpoint_with_other_arrays_is_refused_with_the_difference(
    tmp_path: Path,
) -> None:
    saved(tmp_path, 1)
    with (
        Checkpointer(tmp_path, keep=1) as checkpoints,
        pytest.raises(
            InputError,
            match=rf"params/w: float32\[{SIZE}\] in the checkpoint, float32\[5\] in this model",
        ),
    ):
        checkpoints.restore(abstract(size=5))
    # The checkpoint does not count as damaged.
    assert restored(tmp_path) is not None


def test_a_checkpoint_with_an_evaluation_replaces_the_one_without(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path, 1, 2)
    with Checkpointer(tmp_path, keep=3) as checkpoints:
        checkpoints.save(2, state_of(2), Progress(best=0.5, best_step=2), 0.5)
        checkpoints.wait()
        assert checkpoints.best_step == 2
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    # A kill before the replacement is complete leaves the earlier checkpoint.
    (folder / "2").rename(folder / "unassessed-2")
    run = restored(tmp_path)
    assert run is not None
    assert run[0] == 2


def test_processes_share_the_checksums_of_the_files(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / name).write_text(name)
    for index in range(2):
        write_checksums(tmp_path, index, 2)
    assert len(json.loads((tmp_path / "sums.0.json").read_text())) == 3
    (tmp_path / "b").write_text("x")
    (tmp_path / "d").unlink()
    # Another number of processes reads the checksums.
    damage = [find_damage(tmp_path, index, 3) for index in range(3)]
    assert sorted(text for share in damage for text in share) == [
        "b: other contents than were written",
        "d: No such file or directory",
    ]


def test_a_checksum_file_that_another_process_writes_is_not_part_of_the_checkpoint(
    tmp_path: Path,
) -> None:
    for name in "abcd":
        (tmp_path / name).write_text(name)
    partial = tmp_path / ".sums.1.json.incomplete-4711"
    partial.write_text("{")
    write_checksums(tmp_path, 0, 2)
    partial.unlink()
    write_checksums(tmp_path, 1, 2)
    assert json.loads((tmp_path / "sums.0.json").read_text()).keys() == {"a", "c"}
    assert json.loads((tmp_path / "sums.1.json").read_text()).keys() == {"b", "d"}
    # Checkpoints of earlier versions may list such a file.
    (tmp_path / "sums.2.json").write_text(json.dumps({partial.name: {"bytes": 1}}))
    assert find_damage(tmp_path) == []
