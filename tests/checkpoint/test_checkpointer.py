"""Checkpoints on disk: which stay, what damage is noticed, and what is refused."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenrec.checkpoint.checkpointer import (
    FOLDER,
    Checkpointer,
    CheckpointReader,
    Progress,
)
from tokenrec.checkpoint.integrity import find_damage, write_sums
from tokenrec.errors import InputError
from tokenrec.ops.tables.lookup import RowsState
from tokenrec.state import TrainState

SIZE = 2_000  # elements, so that the weights' file is longer than all others


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
        workdir, **({"keep": 3} | options), about={"seed": 7}
    ) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), Progress(), None)
    return workdir / FOLDER


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
    found = restored(tmp_path)
    assert found is not None
    assert (found[0], found[2]) == (4, progress)
    assert equal(found[1], state_of(4))


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
        found = restored(tmp_path)
        assert found is not None
        assert found[0] == 1
        said = capsys.readouterr().err
        assert (
            "checkpoint 2 is damaged: " + victim.relative_to(folder / "2").as_posix()
            in said
        )
        aside = sorted(folder.glob("damaged-2*"))
        assert len(aside) == count + 1


def test_a_run_without_a_whole_checkpoint_is_refused_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path, 1, 2)
    for step in (1, 2):
        (folder / str(step) / "state" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(
        InputError, match="no whole checkpoint: 2 damaged ones were set aside"
    ):
        restored(tmp_path)
    assert {path.name for path in folder.iterdir()} == {"damaged-1", "damaged-2"}


def test_a_save_that_a_kill_cut_short_is_not_there(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    partial = folder / "2.orbax-checkpoint-tmp"
    (partial / "state").mkdir(parents=True)
    found = restored(tmp_path)
    assert found is not None
    assert found[0] == 1
    assert not partial.exists()


def test_a_kill_before_the_sums_are_written_leaves_a_checkpoint_that_is_used(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path, 1)
    (folder / "1" / "sums.0.json").unlink()
    found = restored(tmp_path)
    assert found is not None
    assert found[0] == 1


def test_another_state_is_refused_with_the_difference(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with (
        Checkpointer(tmp_path, keep=1) as checkpoints,
        pytest.raises(
            InputError,
            match=rf"params/w: float32\[{SIZE}\] in the checkpoint, float32\[5\] in this model",
        ),
    ):
        checkpoints.restore(abstract(size=5))
    assert restored(tmp_path) is not None  # it was not taken for damaged


def test_the_evaluation_of_a_step_that_was_saved_before_it_replaces_it_whole(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path, 1, 2)
    with Checkpointer(tmp_path, keep=3) as checkpoints:
        checkpoints.save(2, state_of(2), Progress(best=0.5, best_step=2), 0.5)
        checkpoints.wait()
        assert checkpoints.best_step == 2
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    # A kill in between leaves the one that was put by.
    (folder / "2").rename(folder / "unassessed-2")
    found = restored(tmp_path)
    assert found is not None
    assert found[0] == 2


def test_processes_share_the_sums_of_the_files(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / name).write_text(name)
    for part in range(2):
        write_sums(tmp_path, part, 2)
    assert len(json.loads((tmp_path / "sums.0.json").read_text())) == 3
    (tmp_path / "b").write_text("x")
    (tmp_path / "d").unlink()
    found = [
        find_damage(tmp_path, part, 3) for part in range(3)
    ]  # another number of processes reads them
    assert sorted(text for part in found for text in part) == [
        "b: other contents than were written",
        "d: No such file or directory",
    ]
