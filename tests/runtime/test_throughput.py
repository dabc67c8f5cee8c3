"""The timer of training speed."""

from __future__ import annotations

import pytest

from tokenrec.runtime.throughput import Throughput


def test_throughput_counts_only_the_time_of_training():
    now = [0.0]
    throughput = Throughput(clock=lambda: now[0])
    with throughput.excluded():
        now[0] += 60  # compilation
    assert throughput.rate() is None
    for _ in range(2):
        throughput.add(300)
        now[0] += 1

    def evaluate():
        now[0] += 100
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), throughput.excluded():
        evaluate()
    now[0] += 1
    assert throughput.rate() == 200
    throughput.add(100)
    now[0] += 1
    assert throughput.rate() == 100
    assert throughput.average() == 175
    assert Throughput(clock=lambda: 0.0).average() is None


def test_seconds_per_step_leave_out_compilation_and_evaluation():
    now = [0.0]
    throughput = Throughput(clock=lambda: now[0])
    assert throughput.seconds_per_step() is None
    with throughput.excluded():
        now[0] += 60  # compilation
    for _ in range(4):
        throughput.add(32)
        now[0] += 0.5
    with throughput.excluded():
        now[0] += 100  # evaluation
    throughput.rate()
    assert throughput.training_seconds == 2
    assert throughput.seconds_per_step() == 0.5
