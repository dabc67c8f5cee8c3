"""Two trainers in one folder, and a trainer that is replaced; processes are real."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.runtime.test_distributed import checkpoints, losses, train_line
from tests.runtime.test_lease import write_lease
from tests.test_train_loop import small
from tokenrec import active_run
from tokenrec.checkpoint.run_folder import load_run_config
from tokenrec.config import Config
from tokenrec.data.pipeline import train_batches
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.errors import EXIT_DONE, EXIT_INPUT, EXIT_PREEMPTED, InputError
from tokenrec.evaluation.evaluate import evaluate_run
from tokenrec.runtime import lease as lease_module
from tokenrec.train_loop import train

# A process that hangs fails the test after this time; no result depends on it.
WAIT_SECONDS = 300
ENDLESS = {"optim.steps": 1_000_000, "train.save_every": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "set"
    # As in test_train_loop, so that its compiled programs serve here too.
    prepare(SyntheticSource(6_000, users=60, items=40), out)
    return out


@contextlib.contextmanager
def trainer(folder: Path, name: str, line: str) -> Iterator[subprocess.Popen]:
    """Start a command; its stderr is in the file NAME.err. The block's end kills it."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # A program for two devices compiles in less time than one for eight.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
    }
    with (
        (folder / f"{name}.err").open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "tokenrec", *line.split()],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd=Path(__file__).parents[1],
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)


def test_a_second_trainer_is_refused_and_a_killed_one_resumes_at_once(
    data: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    with trainer(tmp_path, "first", train_line(data, workdir, **ENDLESS)) as first:
        # While the second one starts, the first one compiles: a loop would cost more.
        wait_for((workdir / "config.json").exists, first)
        config = (workdir / "config.json").read_bytes()
        # With another config: the lease is looked at before config.json.
        other = train_line(data, workdir, **{"model.width": 8})
        with trainer(tmp_path, "second", other) as second:
            assert second.wait(WAIT_SECONDS) == EXIT_INPUT
        error = (tmp_path / "second.err").read_text()
        assert f"--workdir '{workdir}' is in use: process {first.pid} on " in error
        assert (workdir / "config.json").read_bytes() == config
        wait_for(lambda: checkpoints(workdir), first)
        first.send_signal(signal.SIGKILL)
    stop = checkpoints(workdir)[-1] + 10
    line = train_line(data, workdir, **ENDLESS | {"train.stop_at": stop})
    with trainer(tmp_path, "third", line) as third:
        assert third.wait(WAIT_SECONDS) == EXIT_DONE
    error = (tmp_path / "third.err").read_text()
    assert f"process {first.pid} on " in error
    assert "left without releasing its lease; taken over" in error
    assert "waiting" not in error
    assert list(losses(workdir)) == list(range(1, stop + 1))
    assert not list(workdir.glob("*lease*"))


# tests/runtime/test_lease.py: a lease that processes take at once is never held by two of them.
@pytest.mark.slow
def test_of_two_trainers_that_start_together_one_trains_its_config(
    data: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    lines = [
        train_line(data, workdir, **{"optim.steps": 30, "model.width": width})
        for width in (4, 8)
    ]
    with (
        trainer(tmp_path, "0", lines[0]) as first,
        trainer(tmp_path, "1", lines[1]) as second,
    ):
        codes = [process.wait(WAIT_SECONDS) for process in (first, second)]
    # One may have ended before the other one looks; then it is another config.
    assert sorted(codes) == [EXIT_DONE, EXIT_INPUT]
    winner = codes.index(EXIT_DONE)
    assert load_run_config(workdir, None).model.width == (4, 8)[winner]
    assert list(losses(workdir)) == list(range(1, 31))


def test_sigterm_ends_the_wait_for_a_lease_that_may_be_stale(
    data: Path, tmp_path: Path
) -> None:
    write_lease(tmp_path, boot="another boot", host="far")
    with trainer(tmp_path, "it", train_line(data, tmp_path)) as process:
        wait_for(lambda: "waiting" in (tmp_path / "it.err").read_text(), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_SECONDS) == EXIT_PREEMPTED
    error = (tmp_path / "it.err").read_text()
    assert "SIGTERM: stopped while waiting for the lease of" in error
    assert not (tmp_path / "config.json").exists()


@pytest.mark.usefixtures("lone_device")
@pytest.mark.parametrize("was_suspended", [False, True])
def test_a_replaced_trainer_writes_no_more(
    was_suspended: bool,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = lease_module._now

    def replaced(*args: object, **named: object) -> Iterator[object]:
        with contextlib.closing(train_batches(*args, **named)) as batches:  # type: ignore[arg-type]
            for step, host in enumerate(batches):
                if step == 4:
                    write_lease(tmp_path, 2, host="far")
                    if was_suspended:
                        monkeypatch.setattr(lease_module, "_now", lambda: now() + 100)
                yield host

    monkeypatch.setattr(active_run, "train_batches", replaced)
    config: Config = small(data, train__log_every=1, train__save_every=1)
    with pytest.raises(InputError, match=r"on far has taken it over .* without saving"):
        train(config, tmp_path, progress=False)
    # The step after which it was replaced is the last one that it saves.
    assert checkpoints(tmp_path)[-1] == 4
    # After a suspension it looks before it writes anything; else before a save.
    assert list(losses(tmp_path))[-1] == (4 if was_suspended else 5)
    assert json.loads((tmp_path / "lease-2.json").read_bytes())["token"] == "other"
    # Readers take no lease.
    assert evaluate_run(tmp_path, "valid", "latest", None)["step"] == 4
