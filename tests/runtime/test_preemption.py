"""Signals that stop a run: the first is recorded, a second Ctrl-C ends it at once."""

import os
import signal

import pytest

from tokenrec.runtime.preemption import StopRequested, StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_recorded(number: signal.Signals) -> None:
    earlier = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.requested() is None
        os.kill(os.getpid(), number)
        assert signals.requested() == number
        with pytest.raises(StopRequested):
            signals.raise_if_requested()
    assert signal.getsignal(number) == earlier


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_ctrl_c_ends_the_run_at_once(first: signal.Signals) -> None:
    with StopSignals():
        os.kill(os.getpid(), first)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
