"""Stand-ins for Slurm: `srun` starts its tasks here, `scontrol` names one node.

Run as `srun`, as Slurm does: every task has a number and a process group of its own, the
first that fails ends the others (--kill-on-bad-exit), and the highest exit code counts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time


def _srun(arguments: list[str]) -> int:
    split = next(i for i, word in enumerate(arguments) if not word.startswith("--"))
    flags = dict(flag.partition("=")[::2] for flag in arguments[:split])
    with open(os.environ["NOTES"], "a") as notes:
        print("srun", *arguments[:split], file=notes)
    assert flags["--ntasks-per-node"] == "1"
    tasks = [
        subprocess.Popen(
            arguments[split:],
            env=os.environ
            | {"SLURM_PROCID": str(index), "BATCH_SHELL": str(os.getppid())},
            cwd=flags["--chdir"],
            start_new_session=True,
        )
        for index in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
    ]

    def to_all(number: int) -> None:
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, number)

    signal.signal(signal.SIGTERM, lambda number, frame: to_all(number))
    while any(task.poll() is None for task in tasks):
        if flags["--kill-on-bad-exit"] == "1" and any(task.poll() for task in tasks):
            to_all(signal.SIGKILL)
        time.sleep(0.01)
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


def _scontrol(arguments: list[str]) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        assert arguments[2] == "nodes[1-2]"
        print("localhost\nelsewhere")
    else:
        with open(os.environ["NOTES"], "a") as notes:
            print("scontrol", *arguments, file=notes)
    return 0


if __name__ == "__main__":
    run = {"srun": _srun, "scontrol": _scontrol}[os.path.basename(sys.argv[1])]
    sys.exit(run(sys.argv[2:]))
