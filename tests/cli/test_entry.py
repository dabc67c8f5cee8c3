"""The command line as a process: lost output, limits and faults at the start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.test_distributed import EXCLUDED

CLONE = Path(__file__).parents[2]
TOKENREC = f"{sys.executable} -m tokenrec"
TINY = (
    "--config=synthetic --config.model.width=4 --config.model.layers=1 "
    "--config.model.windows='()' --config.tokens.maker=linear --config.data.events=4 "
    "--config.data.batch_size=16 --config.data.eval_batch_size=32 "
    "--config.optim.warmup_steps=1 --config.optim.steps=4 --config.train.log_every=1 "
    # Fewer features compile in less time.
    f"--config.data.exclude={EXCLUDED}"
)


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line],
        cwd=CLONE,
        # No cache that other tests share: here its files may be cut. A program for one device compiles in less time.
        env=os.environ
        | {"PYTHONPATH": str(CLONE), "JAX_COMPILATION_CACHE_DIR": ""}
        | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_few_messages(errors: str) -> None:
    """Check for one message each of checkpoint, TensorBoard and compiled programs."""
    lines = errors.splitlines()
    assert all(line.startswith("tokenrec: ") for line in lines), errors
    # The checkpointer repeats the message of a save that failed.
    assert 1 <= len(lines) <= 4, errors


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    done = shell(f"{TOKENREC} prepare synthetic --rows=3000 --out={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of compiled programs, for runs whose files are not cut."""
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize(
    "redirection",
    [
        "2>&1 | head -n 1",
        pytest.param("2> /dev/full > /dev/full", marks=pytest.mark.slow),
        # tests/runtime/test_std_streams.py closes both streams of a shorter program.
        pytest.param("2>&- >&-", marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_when_nobody_reads_its_output(
    tmp_path: Path, data: Path, compiled: str, redirection: str
) -> None:
    run = tmp_path / "run"
    done = shell(
        f"{{ {TOKENREC} train {TINY} --data={data} --workdir={run}; "
        f"echo $? > {tmp_path}/code; }} {redirection}",
        JAX_COMPILATION_CACHE_DIR=compiled,
    )
    assert (tmp_path / "code").read_text() == "0\n"
    assert "Traceback" not in done.stdout + done.stderr
    assert (run / "checkpoints" / "4").is_dir()


@pytest.mark.parametrize("verb", ["config", "--help"])
def test_a_reader_that_has_seen_enough_ends_the_output_quietly(verb: str) -> None:
    done = shell(f"set -o pipefail; {TOKENREC} {verb} | head -n 1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


def test_output_that_a_full_disk_cut_is_an_error() -> None:
    done = shell(f"{TOKENREC} config > /dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith("tokenrec: standard output: No space left on device")
    assert done.stderr.count("\n") == 1


def test_a_limit_of_open_files_that_is_too_low_is_named_with_its_remedy(
    tmp_path: Path, data: Path
) -> None:
    run = tmp_path / "run"
    done = shell(f"ulimit -n 40; {TOKENREC} train {TINY} --data={data} --workdir={run}")
    assert done.returncode == 2
    assert "may open 40 files at once (`ulimit -n`)" in done.stderr
    assert "`ulimit -n 4096`" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not run.exists()


def test_a_soft_limit_of_open_files_is_raised(
    tmp_path: Path, data: Path, compiled: str
) -> None:
    run = tmp_path / "run"
    done = shell(
        f"ulimit -S -n 40; {TOKENREC} train {TINY} --data={data} --workdir={run} "
        "--quiet",
        JAX_COMPILATION_CACHE_DIR=compiled,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("blocks", [1, 8])
def test_a_limit_of_the_file_size_is_one_message_with_the_path(
    tmp_path: Path, data: Path, compiled: str, blocks: int
) -> None:
    run = tmp_path / "run"
    # A copy: what is added to it here may be cut.
    copied = shutil.copytree(compiled, tmp_path / "compiled")
    # A block is 1,024 bytes: config.json is larger than one, a checkpoint than eight.
    done = shell(
        f"ulimit -f {blocks}; {TOKENREC} train {TINY} --data={data} --workdir={run} "
        "--quiet --config.train.keep_compiled=False",
        JAX_COMPILATION_CACHE_DIR=str(copied),
    )
    assert done.returncode == 2
    assert str(run) in done.stderr
    assert_few_messages(done.stderr)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize(
    "options",
    [
        "size=64k",
        pytest.param("size=8m,nr_inodes=4", marks=pytest.mark.slow),
        "size=8m,ro",
    ],
)
def test_a_full_disk_at_the_start_names_the_place(
    tmp_path: Path, data: Path, options: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shell(f"mount -t tmpfs -o {options} none {disk}")
    if mounted.returncode:
        pytest.skip(f"this machine allows no mount: {mounted.stderr}")
    try:
        shell(f"[[ {options} == size=64k ]] && cat /dev/zero > {disk}/filler")
        done = shell(
            f"{TOKENREC} train {TINY} --data={data} --workdir={disk}/run --quiet"
        )
    finally:
        shell(f"umount {disk}")
    assert done.returncode == 2
    assert f"{disk}/run" in done.stderr
    assert_few_messages(done.stderr)
