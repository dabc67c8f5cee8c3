"""One trainer at a time in a folder: real processes race, are killed and are suspended."""

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from tokenrec.errors import EXIT_INPUT, InputError
from tokenrec.runtime import lease as lease_module
from tokenrec.runtime import lease_file
from tokenrec.runtime import retry as retry_module
from tokenrec.runtime.lease import Lease, LeaseTiming, acquire
from tokenrec.runtime.process_identity import ProcessIdentity, this_process

ROOT = Path(__file__).parents[2]
# A process that hangs fails the test after this time; no result depends on it.
WAIT_SECONDS = 120
# Short waits. The heartbeat is short against `silence`, as it is by default.
QUICK = LeaseTiming(heartbeat=0.1, silence=3.0, settle=0.1, grace=0.0, poll=0.05)
STILL = dataclasses.replace(QUICK, heartbeat=3600.0)
# Hold a lease as another machine would, say "held", and say what `check` says.
HOLDS = """
import dataclasses, sys, time
from pathlib import Path
from tokenrec.errors import InputError
from tokenrec.runtime import lease, lease_file
here = lease_file.this_process()
if sys.argv[2] == "elsewhere":
    far = dataclasses.replace(here, host="far", boot="another boot")
    lease_file.this_process = lambda: far
with lease.acquire(Path(sys.argv[1]), timing=lease.LeaseTiming(heartbeat=0.1)) as held:
    print("held", flush=True)
    while True:
        time.sleep(0.01)
        try:
            held.check()
        except InputError as error:
            print(error, flush=True)
            sys.exit(2)
"""


@contextlib.contextmanager
def holding(workdir: Path, where: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease; killed at the end of the block."""
    line = [sys.executable, "-c", HOLDS, str(workdir), where]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def leases(workdir: Path) -> list[str]:
    """Names of the files that this module makes."""
    return sorted(path.name for path in workdir.iterdir() if "lease" in path.name)


def write_lease(
    workdir: Path, number: int = 1, token: str = "other", **changes: object
) -> Path:
    """Write the lease of a process of this machine; `changes` are to its fields."""
    fields = {
        "token": token,
        **dataclasses.asdict(this_process()),
        "since": "yesterday",
        "heartbeat": "today",
        "beats": 0,
    }
    path = workdir / f"lease-{number}.json"
    path.touch()
    fields["inode"] = path.stat().st_ino
    path.write_bytes(json.dumps(fields | changes).encode().ljust(1023) + b"\n")
    return path


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lease_is_one_file_that_an_orderly_exit_removes(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with acquire(tmp_path) as lease:
        assert leases(tmp_path) == ["lease-1.json"]
        record = json.loads((tmp_path / "lease-1.json").read_bytes())
        assert (record["pid"], record["host"]) == (os.getpid(), this_process().host)
        lease.check()
        lease.verify()
    assert leases(tmp_path) == []
    assert set(threading.enumerate()) == before
    # The folder is free again.
    acquire(tmp_path).release()


def test_the_second_trainer_is_told_who_holds_the_folder_and_what_to_do(
    tmp_path: Path,
) -> None:
    with holding(tmp_path, "here") as process:
        with pytest.raises(InputError) as refused:
            acquire(tmp_path, timing=QUICK)
        record = json.loads((tmp_path / "lease-1.json").read_bytes())
        for part in (
            f"--workdir '{tmp_path}' is in use",
            f"process {process.pid} on {this_process().host}",
            f"since {record['since']}",
            "last heartbeat 2",
            "give another --workdir, or wait",
            f"delete '{tmp_path / 'lease-1.json'}'",
        ):
            assert part in str(refused.value)
        # The holder has noticed nothing.
        assert process.poll() is None
        assert leases(tmp_path) == ["lease-1.json"]


def test_a_killed_holder_is_replaced_without_any_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holding(tmp_path, "here") as process:
        process.kill()
        process.wait()
        monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
        with acquire(tmp_path):
            assert leases(tmp_path) == ["lease-2.json"]


def test_a_holder_that_nobody_has_waited_for_has_ended(tmp_path: Path) -> None:
    with holding(tmp_path, "here") as process:
        process.kill()
        # A zombie: this process has not called `wait`.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        acquire(tmp_path, timing=QUICK).release()


def test_a_holder_that_takes_a_moment_to_end_is_waited_for(tmp_path: Path) -> None:
    patient = dataclasses.replace(QUICK, grace=float(WAIT_SECONDS))
    with holding(tmp_path, "here") as process:
        killer = threading.Timer(0.3, process.kill)
        killer.start()
        acquire(tmp_path, timing=patient).release()
        killer.join()


def test_a_process_id_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    write_lease(tmp_path, started=this_process().started + 1)
    acquire(tmp_path, timing=QUICK).release()
    write_lease(tmp_path)
    with pytest.raises(InputError, match="is in use"):
        acquire(tmp_path, timing=QUICK)


@pytest.mark.parametrize(
    "changes",
    [
        {"boot": "another boot"},
        {"pid_namespace": "pid:[1]"},
        {"boot": ""},
        {"started": 0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_processes_of_other_machines_and_containers_cannot_be_seen(
    changes: dict[str, object],
) -> None:
    here = this_process()
    assert here.is_running() is True
    gone = dataclasses.replace(here, started=here.started + 1)
    assert gone.is_running() is False
    # Whether there is a process of this number here says nothing.
    assert dataclasses.replace(here, **changes).is_running() is None  # type: ignore[arg-type]


def test_a_process_that_proc_hides_may_be_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = this_process()
    other = dataclasses.replace(here, pid=here.pid + 1)
    module = sys.modules[ProcessIdentity.__module__]
    seen = module._stat_fields
    monkeypatch.setattr(
        module, "_stat_fields", lambda pid: seen(pid) if pid == here.pid else None
    )

    def kill(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert other.is_running() is None


def test_a_copy_of_the_folder_of_a_run_in_progress_can_be_trained(
    tmp_path: Path,
) -> None:
    original, copy = tmp_path / "run", tmp_path / "copy"
    original.mkdir()
    with acquire(original, timing=QUICK) as lease:
        shutil.copytree(original, copy)
        acquire(copy, timing=dataclasses.replace(QUICK, silence=0.5)).release()
        with pytest.raises(InputError, match="is in use"):
            acquire(original, timing=QUICK)
        lease.verify()


def test_a_storage_fault_before_a_save_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry_module, "_DELAYS", (0.0, 0.0))
    read = lease_file.read_token
    failures = iter([errno.ESTALE, errno.EIO])

    def faulty(path: Path) -> str:
        for number in failures:
            raise OSError(number, os.strerror(number))
        return read(path)

    with acquire(tmp_path) as lease:
        monkeypatch.setattr(lease_module, "read_token", faulty)
        lease.verify()


def test_a_silent_lease_of_another_machine_is_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The clock of the other machine is years ahead: it must not matter.
    write_lease(
        tmp_path, boot="another boot", host="far", heartbeat="2099-01-01T00:00:00+00:00"
    )
    short = dataclasses.replace(QUICK, silence=0.3)
    with acquire(tmp_path, timing=short) as lease:
        assert leases(tmp_path) == ["lease-2.json"]
        lease.verify()
    errors = capsys.readouterr().err
    assert "on far holds the lease; waiting up to 0.4 s" in errors
    assert "on far left without releasing its lease; taken over" in errors


def test_a_lease_of_another_machine_whose_heartbeat_moves_is_respected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with holding(tmp_path, "elsewhere") as process:
        with pytest.raises(InputError, match=rf"process {process.pid} on far trains"):
            acquire(tmp_path, timing=dataclasses.replace(QUICK, silence=WAIT_SECONDS))
        assert process.poll() is None


def test_time_in_which_the_disk_does_not_answer_is_no_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lease(tmp_path, boot="another boot")
    read, looks = lease_file.read_lease, []
    now = [0.0]

    def hanging(name: Path) -> bytes | None:
        # The disk answers once in 100 s, also for the holder, which writes then.
        looks.append(now[0])
        now[0] += 100.0
        data = read(name)
        if len(looks) == 3:
            write_lease(tmp_path, boot="another boot", beats=1)
        return data

    monkeypatch.setattr(lease_module, "read_lease", hanging)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(InputError, match="is in use"):
        acquire(tmp_path)
    assert path.exists()


def test_a_signal_ends_the_wait(tmp_path: Path) -> None:
    write_lease(tmp_path, boot="another boot")

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        acquire(tmp_path, interrupted=interrupted)
    assert leases(tmp_path) == ["lease-1.json"]


def test_an_interrupted_takeover_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lease(tmp_path, boot="another boot")
    timing = dataclasses.replace(QUICK, silence=0.1, settle=7.0)

    def interrupted(
        seconds: float, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        if seconds == timing.settle:
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        acquire(tmp_path, timing=timing)
    # This process lives on, as a notebook does: with its lease it would refuse itself.
    assert leases(tmp_path) == ["lease-1.json"]


def test_a_file_that_is_no_lease_is_watched_like_a_silent_one(tmp_path: Path) -> None:
    (tmp_path / "lease-7.json").write_bytes(b"[" * 5_000)
    acquire(tmp_path, timing=dataclasses.replace(QUICK, silence=0.2)).release()
    assert leases(tmp_path) == []


def test_a_suspended_holder_finds_itself_replaced_and_leaves_the_new_lease(
    tmp_path: Path,
) -> None:
    with holding(tmp_path, "elsewhere") as process:
        process.send_signal(signal.SIGSTOP)
        with acquire(tmp_path, timing=dataclasses.replace(QUICK, silence=0.5)) as lease:
            process.send_signal(signal.SIGCONT)
            words, _ = process.communicate(timeout=WAIT_SECONDS)
            assert process.returncode == EXIT_INPUT
            assert f"no longer belongs to this process ({process.pid})" in words
            assert f"process {os.getpid()} on " in words
            assert leases(tmp_path) == ["lease-2.json"]
            lease.verify()


@pytest.mark.parametrize("ask", [Lease.check, Lease.verify])
def test_a_lost_lease_is_noticed_without_a_heartbeat(
    ask: Callable[[Lease], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with acquire(tmp_path, timing=STILL) as lease:
        path = write_lease(tmp_path, 2)
        if ask is Lease.check:
            # Cheap while heartbeats are on time; overdue ones make it look.
            lease.check()
            later = lease_module._now() + 3 * STILL.heartbeat
            monkeypatch.setattr(lease_module, "_now", lambda: later)
        with pytest.raises(InputError, match="has taken it over at yesterday"):
            ask(lease)
    assert path.exists()


def test_the_heartbeat_notices_that_the_lease_is_lost(tmp_path: Path) -> None:
    with acquire(tmp_path, timing=QUICK) as lease:
        (tmp_path / "lease-1.json").unlink()
        # Without a read of its own, `check` says what the heartbeat has found.
        lease._interval = 3600.0
        wait_for(lambda: bool(lease._loss))
        with pytest.raises(InputError, match=r"lease 'lease-1\.json' was deleted"):
            lease.check()


def test_a_higher_number_that_is_withdrawn_at_once_is_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with acquire(tmp_path, timing=STILL) as lease:
        path = write_lease(tmp_path, 2)
        monkeypatch.setattr(time, "sleep", lambda seconds: path.unlink())
        lease.verify()


def test_a_lease_that_was_lost_unnoticed_is_not_released(tmp_path: Path) -> None:
    with acquire(tmp_path, timing=STILL):
        path = write_lease(tmp_path, 1)
    assert path.exists()


def test_a_heartbeat_never_writes_into_the_lease_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with acquire(tmp_path, timing=STILL) as lease:
        beat = lease._record.next_beat()
        path = write_lease(tmp_path, 1)
        before = path.read_bytes()
        assert not lease_file.write_heartbeat(path, beat)
        assert path.read_bytes() == before
        path.unlink()
        assert not lease_file.write_heartbeat(path, beat)
        assert not path.exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_heartbeat_that_fails_is_said_and_does_not_end_the_run(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing, pwrite, failures = threading.Event(), os.pwrite, []

    def faulty(*arguments: object) -> int:
        if failing.is_set():
            failures.append(1)
            raise OSError(number, os.strerror(number))
        return pwrite(*arguments)  # type: ignore[arg-type]

    def beats() -> int:
        return json.loads((tmp_path / "lease-1.json").read_bytes())["beats"]

    monkeypatch.setattr(os, "pwrite", faulty)
    with acquire(tmp_path, timing=QUICK) as lease:
        failing.set()
        wait_for(lambda: len(failures) > 2)
        lease.check()
        failing.clear()
        at = beats()
        wait_for(lambda: beats() > at)
        lease.verify()
    errors = capsys.readouterr().err
    assert errors.count(f"{os.strerror(number)}; the run goes on") == 1
    assert leases(tmp_path) == []


@pytest.mark.parametrize("has_links", [True, False])
def test_a_full_disk_is_named(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = threading.Event()

    def link(*_: object) -> None:
        full.set()
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def fsync(descriptor: int) -> None:
        if full.is_set():
            os.truncate(descriptor, 0)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if has_links:
        full.set()
    else:
        # The disk is full when the lease itself is written, and not its partial file.
        monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(InputError) as refused:
        acquire(tmp_path)
    assert f"--workdir '{tmp_path}': its lease cannot be written: No space left" in str(
        refused.value
    )
    assert leases(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_has_leases_too(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    with acquire(tmp_path):
        assert leases(tmp_path) == ["lease-1.json"]
        with pytest.raises(InputError, match="is in use"):
            acquire(tmp_path, timing=QUICK)
    assert leases(tmp_path) == []


def test_a_link_whose_answer_is_lost_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def repeated(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", repeated)
    with acquire(tmp_path):
        assert leases(tmp_path) == ["lease-1.json"]


def test_a_takeover_that_comes_late_withdraws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lease(tmp_path, 1, started=1)
    create = lease_file.create_lease
    holders = []

    def late(*arguments: object) -> bool:
        # Since this process has found number 1 stale, another one has taken it over,
        # has ended in order, and a third one has begun.
        if not holders:
            (tmp_path / "lease-1.json").unlink()
            holders.append(write_lease(tmp_path, 1, token="third"))
        return create(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(lease_module, "create_lease", late)
    with pytest.raises(InputError, match="is in use"):
        acquire(tmp_path, timing=QUICK)
    assert leases(tmp_path) == ["lease-1.json"]


def race(
    folder: Path, rounds: int, barrier: Barrier, results: multiprocessing.Queue
) -> None:
    """Try to take the stale lease of each round; the winner holds it to its end."""
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for the whole process
    won = []
    for number in range(rounds):
        barrier.wait(WAIT_SECONDS)
        lease = None
        with contextlib.suppress(InputError):
            lease = acquire(folder / str(number), timing=QUICK)
            won.append(number)
        barrier.wait(WAIT_SECONDS)
        if lease is not None:
            lease.release()
    results.put(won)


def test_of_many_processes_one_takes_over_a_stale_lease(tmp_path: Path) -> None:
    rounds, count = 24, 6
    for number in range(rounds):
        (tmp_path / str(number)).mkdir()
        # Every third folder has no lease.
        if number % 3:
            write_lease(tmp_path / str(number), number % 3, started=1)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=race, args=(tmp_path, rounds, barrier, results))
        for _ in range(count)
    ]
    for process in processes:
        process.start()
    won = [number for _ in processes for number in results.get(timeout=WAIT_SECONDS)]
    for process in processes:
        process.join()
    assert sorted(won) == list(range(rounds))
    assert all(not leases(tmp_path / str(number)) for number in range(rounds))


def churn(
    folder: Path, seed: int, barrier: Barrier, results: multiprocessing.Queue
) -> None:
    """Hold the lease again and again; leave it as a killed process does, or release it."""
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for the whole process
    chance, held, together, lost = random.Random(seed), 0, 0, 0
    inside = folder / "inside"
    barrier.wait(WAIT_SECONDS)
    while held < 25:
        try:
            lease = acquire(folder, timing=STILL)
        except InputError:
            continue
        held += 1
        try:
            inside.touch(exist_ok=False)
        except FileExistsError:
            together += 1
        time.sleep(chance.uniform(0, 0.003))
        lost += bool(lease.find_loss())
        inside.unlink(missing_ok=True)
        if chance.random() < 0.5:
            lease.release()
            continue
        lease._released.set()
        lease._thread.join()
        killed = dataclasses.replace(lease._record.process, started=1)
        record = dataclasses.replace(lease._record, process=killed)
        lease_file.write_heartbeat(lease._path, record)
    results.put((together, lost))


def test_leases_that_come_and_go_are_never_held_by_two(tmp_path: Path) -> None:
    count = 4
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=churn, args=(tmp_path, seed, barrier, results))
        for seed in range(count)
    ]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=WAIT_SECONDS) for _ in processes]
    for process in processes:
        process.join()
    assert outcomes == [(0, 0)] * count
