"""Other data under a run, and kills of the commands around it, for `chaos.py`."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from chaos_lab import Lab
from chaos_outcome import Outcome, refused, survived
from chaos_process import Failure, Process
from chaos_signals import resumes

_USERS, _ITEMS = 50, 31
_START_MS = 1_640_995_200_000  # 2022-01-01
_VALID_FROM = "2022-01-02"
_SCHEMA = {
    "features": [
        {"name": "item_id", "kind": "categorical", "entity": "item"},
        {"name": "clicked", "kind": "categorical", "entity": "action"},
    ],
    "columns": {"clicked": "click"},
    "tasks": [{"name": "click"}],
    "key_types": {"user_id": "int64", "item_id": "int64"},
}


def other_chunks(lab: Lab) -> Outcome:
    """Resume with the same rows in other chunks, which have another order."""
    lineage = lab.rested()
    other = lab.new_path("chunks")
    lab.run([*lab.prepare_line(other), "--chunk-events=4", "--overlap=4"])
    before = lineage.step()
    with Process(lab, lab.train_line(lineage.workdir, other)) as process:
        words = process.refusal(str(lineage.workdir), "rows")
    shutil.rmtree(other)
    if lineage.step() != before:
        raise Failure(f"the log went from step {before} to {lineage.step()}: {words}")
    resumes(lineage)
    return refused(words)


def grown_log(lab: Lab) -> Outcome:
    """Resume with a log that has grown; its schema and ids are equal."""
    folder = lab.new_path("grown")
    folder.mkdir()
    (folder / "schema.json").write_text(json.dumps(_SCHEMA))
    for name, rows in (("before", 2_000), ("after", 3_000)):
        _prepare_log(lab, folder, name, rows)
    workdir = folder / "run"
    lab.run(lab.train_line(workdir, folder / "before", train__stop_at=10))
    line = lab.train_line(workdir, folder / "after", train__stop_at=20)
    with Process(lab, line) as process:
        words = process.refusal(str(workdir), "rows")
    lab.run(lab.train_line(workdir, folder / "before", train__stop_at=20))
    shutil.rmtree(folder)
    return refused(words)


def _prepare_log(lab: Lab, folder: Path, name: str, rows: int) -> None:
    """Prepare the first rows of a log as the data set `folder / name`."""
    minute = 60_000
    lines = "".join(
        f"{row % _USERS},{row % _ITEMS},{_START_MS + row * minute},{row % 3 % 2}\n"
        for row in range(rows)
    )
    log = folder / f"{name}.csv"
    log.write_text(f"user_id,item_id,time_ms,click\n{lines}")
    line = ["prepare", "delimited", f"--schema={folder / 'schema.json'}"]
    line += [f"--log={log}", f"--valid-from={_VALID_FROM}", f"--out={folder / name}"]
    lab.run(line)


def kill_in_prepare(lab: Lab) -> Outcome:
    """SIGKILL to `prepare`: no part of a data set may have its name."""
    out = lab.new_path("prepared")
    _kill(lab, lab.prepare_line(out), 2.0)
    if out.exists() and _contents(out) != _contents(lab.data):
        raise Failure("a killed prepare left part of a data set under its name")
    lab.run([*lab.prepare_line(out), "--overwrite"])
    same = _contents(out) == _contents(lab.data)
    left = [path.name for path in lab.folder.glob(f".*{out.name}*")]
    shutil.rmtree(out)
    if not same:
        raise Failure("prepare after a kill differs")
    return survived(f"left {left}" if left else "")


def kill_in_predict(lab: Lab) -> Outcome:
    """SIGKILL to `predict`: no part of its output may have its name."""
    whole = lab.folder / "scores-whole.parquet"
    if not whole.exists():
        lab.run(_predict_line(lab, whole))
    out = lab.new_path("scores").with_suffix(".parquet")
    _kill(lab, _predict_line(lab, out), 6.0)
    if out.exists() and out.read_bytes() != whole.read_bytes():
        raise Failure("a killed predict left part of its output under its name")
    lab.run(_predict_line(lab, out))
    if out.read_bytes() != whole.read_bytes():
        raise Failure("predict after a kill differs")
    return survived()


def _predict_line(lab: Lab, out: Path) -> list[str]:
    workdir = lab.whole(1).workdir
    return [
        "predict",
        f"--workdir={workdir}",
        "--split=valid",
        "--checkpoint=latest",
        f"--out={out}",
    ]


def _kill(lab: Lab, line: Sequence[str], seconds: float) -> None:
    """Start a command and kill it within this time."""
    with Process(lab, line) as process:
        time.sleep(lab.chance.uniform(0, seconds))
        process.send(signal.SIGKILL)
        process.exit_code()


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
