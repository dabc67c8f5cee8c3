"""Checkpoints on disk: which ones stay, and how damaged ones are found."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenrec.checkpoint import checkpointer
from tokenrec.checkpoint.checkpointer import Checkpointer
from tokenrec.checkpoint.integrity import find_damage, is_verified, write_checksums
from tokenrec.checkpoint.progress import Progress
from tokenrec.checkpoint.reader import (
    CHECKPOINTS_FOLDER,
    CheckpointReader,
)
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
            checkpoints.save(step, state_of(step), Progress())
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
        if path.is_file() and path.stat().st_size and not path.match("sums*.json")
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
    progress = Progress(
        best=0.5,
        best_step=2,
        waited=1,
        skipped=3,
        assessed=False,
        step=4,
        criterion="macro_auc on valid",
    )
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        assert checkpoints.restore(abstract()) is None
        checkpoints.save(4, state_of(4), progress)
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


def test_missing_checksums_are_written_at_the_next_start_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path, 1)
    # As after a kill between the end of the save and the checksums.
    for path in folder.glob("1/sums*.json"):
        path.unlink()
    with CheckpointReader(tmp_path) as checkpoints:
        assert checkpoints.load_state("latest", abstract())[0] == 1
    assert "checkpoint 1" in (said := capsys.readouterr().err)
    assert "has no checksums yet" in said
    run = restored(tmp_path)
    assert run is not None
    assert run[0] == 1
    assert "the checksums are written now" in capsys.readouterr().err
    weights = max(files_of(folder / "1"), key=lambda path: path.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert find_damage(folder / "1")


def run_alone(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own.

    When Orbax fails to read one array, TensorStore reports the others to an event loop
    that is closed already, from threads of its own and at any later time.
    """
    imports = (
        "import sys; from pathlib import Path; import re;"
        "from tests.checkpoint.test_checkpointer import *;"
    )
    return subprocess.run(
        [sys.executable, "-c", imports + script, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_checkpoint_without_checksums_that_cannot_be_read_is_set_aside(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path, 1, 2)
    for path in folder.glob("2/sums*.json"):
        path.unlink()
    # A power failure may leave empty files under a complete name.
    weights = max(files_of(folder / "2"), key=lambda path: path.stat().st_size)
    weights.write_bytes(b"")
    process = run_alone("print(restored(Path(sys.argv[1]))[0])", tmp_path)
    assert process.stdout == "1\n", process.stderr
    assert "checkpoint 2 is damaged" in process.stderr


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


def test_a_later_evaluation_changes_the_progress_and_not_the_arrays(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path, 1, 2)
    before = {path: path.read_bytes() for path in files_of(folder / "2")}
    evaluated = Progress(best=0.5, best_step=2, step=2)
    with Checkpointer(tmp_path, keep=3) as checkpoints:
        checkpoints.save(2, state_of(2), evaluated)
        assert checkpoints.best_step == 2
    assert {path: path.read_bytes() for path in before} == before
    run = restored(tmp_path)
    assert run is not None
    assert run[2] == evaluated
    (folder / "2" / "progress.json").write_text('{"best": 0.6, "digest": ""}')
    run = restored(tmp_path)
    assert run is not None
    assert run[0] == 1


def test_a_checkpoint_that_an_earlier_version_was_replacing_comes_back(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path, 1, 2)
    (folder / "2").rename(folder / "unassessed-2")
    run = restored(tmp_path)
    assert run is not None
    assert run[0] == 2


def test_of_equal_evaluations_the_earliest_stays_as_the_best(tmp_path: Path) -> None:
    progress = Progress()
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        for step in range(1, 6):
            at_step = dataclasses.replace(progress, step=step)
            progress = at_step.after_evaluation(0.5)
            checkpoints.save(step, state_of(step), progress)
    with CheckpointReader(tmp_path) as checkpoints:
        assert checkpoints.steps == [1, 5]
        assert checkpoints.best_step == progress.best_step == 1


def test_without_the_best_checkpoint_the_best_one_before_it_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress()
    with Checkpointer(tmp_path, keep=9) as checkpoints:
        for step, value in enumerate([0.3, 0.2, 0.4, 0.1], start=1):
            progress = dataclasses.replace(progress, step=step).after_evaluation(value)
            checkpoints.save(step, state_of(step), progress)
    shutil.rmtree(tmp_path / CHECKPOINTS_FOLDER / "3")
    with CheckpointReader(tmp_path) as checkpoints:
        assert checkpoints.best_step == 1
    assert "no checkpoint 3" in capsys.readouterr().err


def test_another_criterion_begins_the_comparison_again() -> None:
    before = Progress(best=0.8, best_step=20, waited=2, step=30, criterion="auc on a")
    assert before.compared_by("auc on a") == before
    # Values of the loss are negative: none of them would ever replace the AUC.
    after = before.compared_by("loss on a")
    assert (after.best, after.best_step, after.waited) == (None, -1, 0)
    assert not after.assessed
    unknown = dataclasses.replace(before, criterion="")
    assert unknown.compared_by("auc on a") == before


# The last byte of a file of more than 64 KiB: all of it is hashed.
@pytest.mark.parametrize("which", ["latest", "2"])
def test_a_flipped_bit_at_the_end_of_a_large_file_is_damage(
    tmp_path: Path, which: str
) -> None:
    # Numbers that do not compress, so that their file is as large as they are.
    noise = jnp.asarray(np.random.default_rng(0).normal(size=60_000), jnp.float32)
    state = dataclasses.replace(state_of(2), params={"w": noise})
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        state,
    )
    with Checkpointer(tmp_path, keep=3) as checkpoints:
        checkpoints.save(2, state, Progress())
    folder = tmp_path / CHECKPOINTS_FOLDER / "2"
    victim = max(files_of(folder), key=lambda path: path.stat().st_size)
    assert victim.stat().st_size > 3 << 16
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with (
        pytest.raises(InputError, match=f"{victim.name}: other contents"),
        CheckpointReader(tmp_path) as checkpoints,
    ):
        checkpoints.load_state(which, shapes)
    with pytest.raises(InputError, match="no intact checkpoint"):
        Checkpointer(tmp_path, keep=3)


def test_checksums_are_written_as_soon_as_a_save_is_complete(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, state_of(1), Progress())
        deadline = time.monotonic() + 60
        # Not with the next save or the end of the run, which may be hours away.
        while not is_verified(tmp_path / CHECKPOINTS_FOLDER / "1"):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_an_old_checkpoint_stays_until_its_successor_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, 1, keep=1)
    seen = []

    def observed(checkpoint: Path, index: int, count: int) -> None:
        seen.append((folder / "1").exists())
        write_checksums(checkpoint, index, count)

    monkeypatch.setattr(checkpointer, "write_checksums", observed)
    saved(tmp_path, 2, keep=1)
    assert seen == [True]
    assert [path.name for path in folder.iterdir()] == ["2"]


@pytest.mark.parametrize("name", ["lr=[1,2]", "a\\b", "a*b?", "gs:", "a b\n{c}"])
def test_a_path_that_looks_like_a_pattern_keeps_its_weights(
    tmp_path: Path, name: str
) -> None:
    workdir = tmp_path / name
    saved(workdir, 1)
    run = restored(workdir)
    assert run is not None
    assert equal(run[1], state_of(1))


def test_a_save_whose_arrays_are_not_there_is_an_error_at_once(tmp_path: Path) -> None:
    # Orbax loses the weights in such a path, without an error of its own.
    process = run_alone(
        "from tokenrec.checkpoint import path_alias;"
        "path_alias._SPECIAL = re.compile('$^'); saved(Path(sys.argv[1]), 1)",
        tmp_path / "lr=[1,2]",
    )
    assert process.returncode == 1
    assert "checkpoint 1 cannot be written" in process.stderr
    assert "its arrays" in process.stderr
