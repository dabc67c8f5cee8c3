"""One trainer at a time in a folder of an object store; real servers and processes."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.object_servers import SCHEMES, Server, object_server
from tests.runtime.test_lease import HOLDS, QUICK, ROOT
from tokenrec.errors import InputError
from tokenrec.runtime.lease import Lease, acquire
from tokenrec.runtime.paths import as_path, list_files


@pytest.fixture(scope="module", params=SCHEMES)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with object_server(request.param, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def workdir(server: Server, request: pytest.FixtureRequest) -> Path:
    return as_path(server.url(request.node.originalname))


@contextlib.contextmanager
def holding(workdir: Path, where: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease; killed at the end of the block."""
    code = HOLDS.replace("Path(sys.argv[1])", "sys.argv[1]")
    line = [sys.executable, "-c", code, str(workdir), where]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_an_orderly_exit_leaves_no_lease(workdir: Path) -> None:
    with acquire(workdir, timing=QUICK) as lease:
        assert list_files(workdir) == ["lease-1.json"]
        lease.verify()
    assert list_files(workdir) == []


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_the_second_trainer_is_told_who_holds_the_folder(
    workdir: Path, where: str
) -> None:
    with (
        holding(workdir, where) as holder,
        pytest.raises(InputError, match=rf"process {holder.pid} on .* trains there"),
    ):
        acquire(workdir, timing=QUICK)


def test_the_lease_of_a_killed_process_is_taken_over(workdir: Path) -> None:
    with holding(workdir, "here") as holder:
        holder.kill()
        holder.wait()
        assert list_files(workdir) == ["lease-1.json"]
        with acquire(workdir, timing=QUICK):
            assert list_files(workdir) == ["lease-2.json"]
    assert list_files(workdir) == []


def test_a_holder_that_was_replaced_says_so_and_saves_no_more(workdir: Path) -> None:
    with acquire(workdir, timing=QUICK) as first:
        # Another machine takes over while this process is suspended.
        record = (workdir / "lease-1.json").read_text()
        token = first._record.token
        (workdir / "lease-2.json").write_text(record.replace(token, "0" * len(token)))
        while not first._loss:
            time.sleep(0.05)
        with pytest.raises(InputError, match="has taken it over"):
            first.verify()
    # It leaves the lease of the other one.
    assert "lease-2.json" in list_files(workdir)


def test_of_two_that_take_over_one_succeeds(workdir: Path) -> None:
    with holding(workdir, "here") as holder:
        holder.kill()
        holder.wait()
        held: list[Lease] = []
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                with contextlib.suppress(InputError):
                    held.append(stack.enter_context(acquire(workdir, timing=QUICK)))
            assert len(held) == 1
