"""The script for Slurm: sound shell, processes that meet, and restarts by exit code.

The script runs here as `sbatch` would run it; slurm_stand_in.py is in place of `srun` and
`scontrol`.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import SLURM, Launch

STAND_IN = Path(__file__).with_name("slurm_stand_in.py")
# In place of `tokenrec`: each process ends with its code of the file `codes`, or, as one
# that is still closing files, after the others.
ENDS = """#!/usr/bin/env bash
read -r code pause < <(sed -n "$((JAX_PROCESS_ID + 1))p" "$CODES")
if [[ $pause == ending ]]; then kill -TERM "$BATCH_SHELL"; pause=0.2; fi
sleep "${pause:-0}"
exit "$code"
"""
# In place of `tokenrec`: meet the others as `tokenrec train --distributed` does.
MEETS = """#!{python}
import json, os, sys
from pathlib import Path
assert os.environ["JAX_PLATFORMS"] == "cuda"  # which this machine does not have
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, {clone!r})
import jax
from tokenrec.runtime.distributed import gather_from_all, initialize
assert "--distributed" in sys.argv
initialize(sigterm_stops_run=True)
said = gather_from_all(" ".join(sys.argv[1:]))
index = jax.process_index()
Path(f"met.{{index}}").write_text(json.dumps([index, jax.process_count(), said]))
"""


def render(launch: Launch, folder: Path, *more: str, **flags: str | None) -> Path:
    code, out, err = launch("--dry-run", *more, **SLURM | flags)
    assert code == 0, err
    file = folder / "job.sbatch"
    file.write_text(out)
    return file


def run(script: Path, job: int, **environment: str) -> tuple[int, list[str], str]:
    """Run the script; return its exit code, its calls of Slurm, and stderr."""
    tools = script.parent / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("srun", "scontrol"):
        text = f'#!/bin/sh\nexec {sys.executable} -IS {STAND_IN} {name} "$@"\n'
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    notes = script.parent / "notes"
    notes.write_text("")
    given = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "NOTES": str(notes),
        "SLURM_SUBMIT_DIR": str(script.parent),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "nodes[1-2]",
    }
    done = subprocess.run(
        ["bash", str(script)],
        env=given | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, notes.read_text().splitlines(), done.stderr


def install(folder: Path, program: str) -> str:
    """Make a Python environment whose `tokenrec` is this program; return its folder."""
    file = folder / "venv" / "bin" / "tokenrec"
    file.parent.mkdir(parents=True)
    file.write_text(program)
    file.chmod(0o755)
    return str(folder / "venv")


def test_the_script_is_sound_shell(launch: Launch, tmp_path: Path) -> None:
    checker = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert checker, "the extra dev brings it"
    own = tmp_path / "own.py"
    own.write_text(
        "from tokenrec.config import Config\n\n\ndef get_config() -> Config:\n    return Config()\n"
    )
    image = {"venv": None, "image": "/images/train.sqsh"}
    sizes = ("--config.data.name=set", "--config.mesh.fsdp=16")
    for script in (
        render(launch, tmp_path),
        render(launch, tmp_path, *sizes, config=str(own), **image),
    ):
        done = subprocess.run(
            [checker, str(script)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout


def options_of(script: Path) -> dict[str, str]:
    """The options that `sbatch` reads: comments before the first command."""
    lines = script.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    words = [
        line.removeprefix("#SBATCH --")
        for line in lines[:first]
        if line.startswith("#SBATCH")
    ]
    return dict(word.partition("=")[::2] for word in words)


def test_slurm_is_asked_for_one_process_a_node_with_all_its_gpus(
    launch: Launch, tmp_path: Path
) -> None:
    script = render(launch, tmp_path, grace_seconds="120", time_limit="2-12")
    assert options_of(script) == {
        "job-name": "synthetic",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "h100:8",
        "cpus-per-gpu": "8",
        "time": "2-12",
        "signal": "TERM@120",
        "output": "synthetic-%j.log",
        "open-mode": "append",
        "requeue": "",
    }
    more = {"topology": "a100-80gb:4x4", "partition": "gpu,spare", "account": "team"}
    options = options_of(render(launch, tmp_path, **more))
    assert options["gpus-per-node"] == "a100:4"
    assert (options["partition"], options["account"]) == ("gpu,spare", "team")


def test_an_elastic_run_may_start_on_fewer_nodes(
    launch: Launch, tmp_path: Path
) -> None:
    elastic = ("--config.train.elastic=accumulate", "--config.train.elastic_devices=16")
    script = render(launch, tmp_path, *elastic, min_nodes="1")
    assert options_of(script)["nodes"] == "1-2"


def test_two_processes_meet_and_get_the_config_that_travels_with_the_job(
    launch: Launch, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    text = (
        Path(__file__).parents[2] / "configs" / "synthetic.py"
    ).read_text() + "# it's mine: $HOME `date` \\\n"
    own.write_text(text)
    program = MEETS.format(python=sys.executable, clone=str(STAND_IN.parents[2]))
    venv = install(tmp_path, program)
    script = render(launch, tmp_path, config=str(own), venv=venv)
    with socket.socket(socket.AF_INET6) as holder:
        # The coordinator of JAX gets the port while it is held like this, no other does.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        port = next(port for port in range(12_000, 28_384) if _binds(holder, port))
        code, calls, errors = run(script, job=16_384 + port - 12_000)
    assert code == 0, errors
    assert "scontrol requeue" not in "\n".join(calls)
    state = tmp_path / "own.slurm"
    assert (state / "config.py").read_text() == text
    command = (
        "train --distributed --config=config.py --data=/shared/data/synthetic "
        "--workdir=/shared/runs/own --quiet"
    )
    for index in range(2):
        met = json.loads((state / f"met.{index}").read_text())
        assert met == [index, 2, [command, command]]


def _binds(holder: socket.socket, port: int) -> bool:
    try:
        holder.bind(("::", port))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("codes", "ends", "requeued"),
    [
        # All is done.
        (["0", "0"], 0, False),
        # A restart would fail in the same way, whoever notices it.
        (["2", "2"], 2, False),
        (["0 0.5", "3"], 3, False),
        (["4", "75"], 4, False),
        # Saved on the signal to stop; a process that still closes its files is waited for.
        (["75 0.3", "75"], 0, True),
        (["143", "143"], 0, True),
        # A crash, at which Slurm kills the other process.
        (["1", "0 9"], 0, True),
        (["0 9", "139"], 0, True),
        # `scancel`, or the end of the time: Slurm decides.
        (["75 ending", "75 0.3"], 75, False),
    ],
)
def test_a_job_is_queued_again_where_it_can_help(
    launch: Launch, tmp_path: Path, codes: list[str], ends: int, requeued: bool
) -> None:
    script = render(launch, tmp_path, venv=install(tmp_path, ENDS))
    (tmp_path / "codes").write_text("\n".join(codes))
    code, calls, errors = run(script, job=7, CODES=str(tmp_path / "codes"))
    assert code == ends, errors
    assert calls[1:] == ["scontrol requeue 7"] * requeued
    # Whatever the order in which they ended, both processes could end by themselves.
    if codes[0].startswith("75"):
        state = tmp_path / "synthetic.slurm"
        assert [(state / f"exit.{i}").read_text() for i in range(2)] == ["75\n"] * 2


def test_restarts_after_crashes_count_and_after_the_signal_do_not(
    launch: Launch, tmp_path: Path
) -> None:
    script = render(launch, tmp_path, max_restarts="1", venv=install(tmp_path, ENDS))
    ends = []
    for codes in ("75\n75", "74\n74", "75\n75", "5\n5"):
        (tmp_path / "codes").write_text(codes)
        code, calls, errors = run(script, job=7, CODES=str(tmp_path / "codes"))
        ends.append((code, len(calls) - 1))
    assert ends == [(0, 1), (0, 1), (0, 1), (5, 0)]
    assert "exit code 5: 1 of 1 restarts" in errors
    # Another job begins anew.
    code, calls, _ = run(script, job=8, CODES=str(tmp_path / "codes"))
    assert (code, calls[1:]) == (0, ["scontrol requeue 8"])


def test_a_container_sees_the_folders_of_the_job(
    launch: Launch, tmp_path: Path
) -> None:
    folders = {"runs": str(tmp_path / "runs"), "data": str(tmp_path / "data" / "set")}
    image = "nvcr.io/team/train:0.1.0"
    script = render(launch, tmp_path, venv=None, image=image, **folders)
    (tmp_path / "codes").write_text("0\n0")
    path = f"{install(tmp_path, ENDS)}/bin:{os.environ['PATH']}"
    # The image has `tokenrec`; here it is in PATH.
    script.write_text(
        script.read_text().replace("prepare\ncode", f"PATH+=:{path}\nprepare\ncode")
    )
    code, calls, errors = run(script, job=7, CODES=str(tmp_path / "codes"))
    assert code == 0, errors
    state = tmp_path / "synthetic.slurm"
    mounts = [state, tmp_path / "runs", tmp_path / "data"]
    assert calls == [
        "srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none --label "
        f"--chdir={state} --container-image=nvcr.io#team/train:0.1.0 "
        f"--container-mounts={','.join(f'{folder}:{folder}' for folder in mounts)} "
        f"--container-workdir={state} --no-container-mount-home"
    ]
