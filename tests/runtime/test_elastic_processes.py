"""Four processes that are killed come back as two; the processes are real."""

import signal
from pathlib import Path

import pytest

from tests.runtime.forked import KILL, KILLED_AT, rows_by_step, run_processes
from tests.runtime.test_distributed import checkpoints, losses, train_line
from tokenrec.checkpoint.device_history import read_history
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.synthetic import SyntheticSource

LAST = 10


# tests/test_elastic.py changes the devices of a run within one process, and
# test_distributed.py kills and resumes two processes.
@pytest.mark.slow
def test_four_processes_that_are_killed_come_back_as_two(
    tmp_path: Path,
) -> None:
    data, whole, elastic = (tmp_path / name for name in ("set", "whole", "elastic"))
    prepare(SyntheticSource(1_500, users=40, items=30), data)
    fields: dict[str, object] = {
        "mesh.fsdp": 4,
        "train.elastic": "accumulate",
        "train.save_every": 2,
        "train.eval_split": "",
        "optim.steps": LAST,
    }

    def line(workdir: Path, **more: object) -> str:
        text = train_line(data, workdir, **fields | more)
        return text.replace("--config.train.eval_split= ", "") + " --distributed"

    # 1. A run that nobody disturbs; another one is killed after some checkpoint.
    folders = [tmp_path / name for name in ("four", "two")]
    killed = run_processes(folders[0], 4, line(whole), line(elastic) + KILL)
    assert killed == [-signal.SIGKILL] * 4, (folders[0] / "0.err").read_text()
    saved = checkpoints(elastic)[-1]
    assert 4 <= saved < KILLED_AT
    # 2. Two processes continue.
    codes = run_processes(folders[1], 2, line(elastic))
    assert codes == [0, 0], (folders[1] / "0.err").read_text()

    # 3. No row is lost and none is read twice.
    read = rows_by_step(folders[0], 1)[:saved]
    read += rows_by_step(folders[1], 0)
    assert read == rows_by_step(folders[0], 0)
    assert len(read) == LAST

    # 4. The losses are those of the undisturbed run.
    expected, found = losses(whole), losses(elastic)
    assert list(found) == list(expected) == list(range(1, LAST + 1))
    assert [found[step] for step in range(1, saved + 1)] == [
        expected[step] for step in range(1, saved + 1)
    ]
    # Sums over devices have another order: measured 1.7e-7.
    assert found == pytest.approx(expected, rel=3e-5)

    # 5. The record says what changed when.
    history = read_history(elastic)
    assert history is not None
    assert [
        (use.step, use.devices, use.processes, use.mesh["fsdp"], use.accumulate)
        for use in history.uses
    ] == [(0, 4, 4, 4, 1), (saved, 2, 2, 2, 2)]
    assert "2 devices in 2 processes" in (folders[1] / "0.err").read_text()
    assert "2 devices in 2 processes" not in (folders[1] / "1.err").read_text()
