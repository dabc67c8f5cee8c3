"""Kinds of faults of `chaos.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import chaos_damage as damage
import chaos_data as data
import chaos_signals as signals
import chaos_storage as storage
import chaos_trainers as trainers
from chaos_lab import Lab
from chaos_outcome import Fault

KINDS: dict[str, Fault] = {
    # Signals.
    "kill in a step": signals.kill_in_a_step,
    "kill at the start": signals.kill_at_the_start,
    "kill in a save": signals.kill_in_a_save,
    "kill before the checksums": signals.kill_before_the_checksums,
    "SIGTERM": signals.stop,
    "SIGTERM at the start": signals.stop_at_the_start,
    "SIGTERM in a save": signals.stop_in_a_save,
    "SIGTERM in an evaluation": signals.stop_in_an_evaluation,
    "SIGTERM of one of two": signals.stop_one_of_two,
    "SIGTERM of one of four": signals.stop_one_of_four,
    "SIGSTOP of one of two": signals.suspend_one_of_two,
    "kill of one of two": signals.kill_one_of_two,
    "kill of one of four": signals.kill_one_of_four,
    # Files of checkpoints.
    "bit of a checkpoint": damage.in_checkpoint(damage.flip),
    "bit of a large file": damage.in_checkpoint(damage.flip, damage.large_files_of),
    "end of a checkpoint": damage.in_checkpoint(damage.truncate),
    "file of a checkpoint gone": damage.in_checkpoint(damage.remove),
    "bit of the checksums": damage.in_checkpoint(damage.flip, damage.checksum_files),
    "end of the checksums": damage.in_checkpoint(
        damage.truncate, damage.checksum_files
    ),
    "checksums that are []": damage.in_checkpoint(
        damage.empty_list, damage.checksum_files
    ),
    "checksums gone": damage.without_checksums,
    "bit of a checkpoint of two": damage.in_checkpoint(damage.flip, processes=2),
    "checksums of four": damage.in_checkpoint(
        damage.truncate, damage.checksum_files, processes=4
    ),
    # The storage.
    "full disk": storage.full_disk,
    "full disk at the start": storage.full_disk_at_the_start,
    "a read fails once": storage.read_fails_once,
    "a write fails once": storage.write_fails_once,
    "the storage fails for good": storage.storage_fails_for_good,
    # Data sets, and the commands beside `train`.
    "bit of the data": damage.in_data(damage.flip),
    "end of the data": damage.in_data(damage.truncate),
    "unreadable data": damage.in_data(damage.make_unreadable),
    "data in other chunks": data.other_chunks,
    "data that has grown": data.grown_log,
    "kill in prepare": data.kill_in_prepare,
    "kill in predict": data.kill_in_predict,
    # Around the run.
    "two trainers": trainers.two_trainers,
    "dead log reader": trainers.dead_log_reader,
}
_NEED_A_DISK = ("full disk", "full disk at the start")


def usable_kinds(kinds: Sequence[str], lab: Lab) -> list[str]:
    """Leave out full disks if none can be mounted, and print that."""
    left_out = [] if lab.disk else [kind for kind in kinds if kind in _NEED_A_DISK]
    if left_out:
        print(
            f"left out, because this user may not mount a file system: {left_out}",
            file=sys.stderr,
        )
    return [kind for kind in kinds if kind not in left_out]
