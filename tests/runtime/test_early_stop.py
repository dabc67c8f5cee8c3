"""SIGTERM before the first step ends `tokenrec train` with exit code 75, in any phase.

The processes are real. Each of them is held in a phase, as a slow disk or a compilation
would hold it, and says so by making a file.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenrec.errors import EXIT_PREEMPTED

CLONE = Path(__file__).parents[2]

# Holds the main thread, which runs the handlers of Python meanwhile, but does not leave.
HOLD = """
import os, pathlib, time

def hold(*arguments, **options):
    pathlib.Path(os.environ["HELD"]).touch()
    for _ in range(120):
        time.sleep(1)
    # Nobody ended it: the test fails, and leaves no process behind.
    os._exit(99)
"""

COMMAND_LINE = "import sys\nfrom tokenrec.cli.entry import main\nsys.exit(main())"

# Replaces a function by `hold`, and runs the command line.
HELD_PHASE = """
import importlib, os, sys
from hold import hold
from tokenrec.runtime import early_stop

early_stop.GRACE_SECONDS = 0.1
# The modules that the phase is in must not be imported before the handler is there.
name, _, attribute = os.environ["PHASE"].partition(":")

class Finder:
    @staticmethod
    def find_spec(module, path=None, target=None):
        if module != name:
            return None
        sys.meta_path.remove(Finder)
        spec = importlib.util.find_spec(module)
        execute = spec.loader.exec_module
        def exec_module(loaded):
            execute(loaded)
            owner, _, leaf = attribute.rpartition(".")
            setattr(getattr(loaded, owner) if owner else loaded, leaf, hold)
        spec.loader.exec_module = exec_module
        return spec

import importlib.util
sys.meta_path.insert(0, Finder)
from tokenrec.cli.entry import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    words = ["prepare", "synthetic", "--rows=3000", f"--out={folder}"]
    subprocess.run(
        [sys.executable, "-m", "tokenrec", *words],
        cwd=CLONE,
        check=True,
        capture_output=True,
    )
    return folder


def started(
    tmp_path: Path, data: Path, code: str, *flags: str, **environment: str
) -> subprocess.Popen[str]:
    (tmp_path / "modules").mkdir(exist_ok=True)
    (tmp_path / "modules" / "hold.py").write_text(HOLD)
    (tmp_path / "program.py").write_text(code)
    sizes = "model.width=4 model.layers=1 model.windows=() tokens.maker=linear data.events=4"
    return subprocess.Popen(
        [
            *(sys.executable, str(tmp_path / "program.py"), "train"),
            *("--config=synthetic", f"--data={data}", f"--workdir={tmp_path / 'run'}"),
            *(f"--config.{size}" for size in sizes.split()),
            *("--config.data.batch_size=16", "--config.optim.steps=40", *flags),
        ],
        env=os.environ
        | {
            "PYTHONPATH": f"{tmp_path / 'modules'}:{CLONE}",
            "HELD": str(tmp_path / "held"),
        }
        | environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


PHASES = {
    "set-up": "tokenrec.run_setup:open_dataset",
    "restoring": "tokenrec.active_run:initial_state",
    "planning": "tokenrec.active_run:train_batches",
    "log": "tokenrec.active_run:open_run_log",
    "compiling": "tokenrec.jitted_step:JittedStep.compile_and_run",
}
ENDS = ("set-up", "compiling")


@pytest.mark.parametrize(
    "phase",
    # The first phase and the last one before a step.
    [
        pytest.param(name, marks=[] if name in ENDS else pytest.mark.slow)
        for name in PHASES
    ],
)
def test_a_signal_before_the_first_step_ends_the_start_with_75(
    tmp_path: Path, data: Path, phase: str
) -> None:
    process = started(tmp_path, data, HELD_PHASE, PHASE=PHASES[phase])
    wait_for(tmp_path / "held", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == EXIT_PREEMPTED
    assert "SIGTERM: stopped before a step was trained" in errors
    assert "Traceback" not in errors
    # Nothing is half written.
    assert not list((tmp_path / "run").glob("**/*incomplete*"))


def test_a_signal_during_the_imports_ends_them_with_75(
    tmp_path: Path, data: Path
) -> None:
    # The first heavy import never returns.
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "jax.py").write_text("from hold import hold\nhold()")
    process = started(tmp_path, data, COMMAND_LINE)
    wait_for(tmp_path / "held", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == EXIT_PREEMPTED
    assert errors.startswith("tokenrec: SIGTERM")
    assert not (tmp_path / "run").exists()


def test_a_signal_while_processes_wait_for_each_other_ends_the_wait_with_75(
    tmp_path: Path, data: Path
) -> None:
    # The main thread is in C++ here, where no handler of Python runs.
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        process = started(
            tmp_path,
            data,
            COMMAND_LINE,
            "--distributed",
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID="1",
        )
        # It has called; nobody answers.
        connection, _ = server.accept()
        with connection:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate()
    assert process.returncode == EXIT_PREEMPTED
    assert "SIGTERM: stopped before a step was trained" in errors


def test_other_verbs_end_by_the_signal_as_usual(tmp_path: Path, data: Path) -> None:
    code = HELD_PHASE.replace(
        "from tokenrec.cli.entry", "sys.argv[1:] = ['config']\nfrom tokenrec.cli.entry"
    )
    process = started(tmp_path, data, code, PHASE="tokenrec.cli.verbs_plan:_config")
    wait_for(tmp_path / "held", process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == -signal.SIGTERM
