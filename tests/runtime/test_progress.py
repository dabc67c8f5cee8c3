"""What a run shows on stderr."""

from __future__ import annotations

import io
import sys

import pytest

from tokenrec.runtime.progress import ProgressDisplay
from tokenrec.runtime.throughput import Throughput


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A timer whose time the test sets; ten steps of a log take `seconds` each."""

    def __init__(self) -> None:
        self.now = 0.0
        self.throughput = Throughput(clock=lambda: self.now)

    def train(self, steps: int, seconds: float) -> None:
        for _ in range(steps):
            self.throughput.add(32)
            self.now += seconds
        self.throughput.rate()

    def other_work(self, seconds: float) -> None:
        with self.throughput.excluded():
            self.now += seconds


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    # Not a fixture: pytest sets stderr anew between the setup of a test and its call.
    screen = Terminal()
    # The size of the terminal that runs the tests, which a library may have set.
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_a_terminal_shows_a_bar_with_step_loss_speed_and_time_left(monkeypatch):
    terminal = use_terminal(monkeypatch)
    clock = Clock()
    bar = ProgressDisplay(clock.throughput, total_steps=100, start_step=40)
    clock.train(10, 1)
    bar.write(50, {"loss": 0.5, "examples_per_second": 1234.4})
    bar.write(50, {"macro_auc": 0.75, "is_click/auc": 0.5}, prefix="valid")
    clock.train(10, 1)
    bar.write(60, {"loss": 0.25, "examples_per_second": 4321})
    bar.close()
    shown = terminal.getvalue()
    assert "valid at step 50: macro_auc 0.7500\n" in shown
    last = shown.split("\r")[-1]
    assert "60/100 steps" in last
    assert "loss 0.2500  4,321 examples/s" in last
    assert " left]" in last


def test_the_bar_says_that_it_compiles_and_then_that_it_trains(monkeypatch):
    terminal = use_terminal(monkeypatch)
    bar = ProgressDisplay(Clock().throughput, total_steps=100)
    bar.show_phase("compiling")
    assert terminal.getvalue().split("\r")[-1].startswith("compiling:   0%")
    bar.show_phase()
    assert terminal.getvalue().split("\r")[-1].startswith("train:   0%")
    bar.close()


def test_time_and_time_left_leave_out_compilation_and_evaluation(monkeypatch):
    terminal = use_terminal(monkeypatch)
    clock = Clock()
    bar = ProgressDisplay(clock.throughput, total_steps=100)
    clock.other_work(600)  # the first step, which compiles
    clock.train(19, 2)
    bar.write(20, {"loss": 0.5})
    clock.other_work(3600)  # an evaluation
    clock.train(20, 2)
    bar.write(40, {"loss": 0.5})
    bar.close()
    # 39 steps of 2 s are done, 60 remain.
    assert "[01:18 trained, 02:00 left]" in terminal.getvalue().split("\r")[-1]


def test_without_a_terminal_progress_is_a_plain_line_every_few_logs(capsys):
    clock = Clock()
    display = ProgressDisplay(clock.throughput, total_steps=100)
    for step in range(10, 110, 10):
        clock.train(10, 1)
        display.write(step, {"loss": 1 / step, "examples_per_second": 2000})
    display.write(100, {"macro_auc": None}, prefix="valid")
    out, err = capsys.readouterr()
    assert out == ""
    first, second, last, valid = err.splitlines()
    assert first == "step 10/100  loss 0.1000  2,000 examples/s  01:30 left"
    assert second.startswith("step 60/100 ")
    assert last.startswith("step 100/100 ")
    assert valid == "valid at step 100: macro_auc -"


def test_without_a_terminal_a_phase_is_a_line_once(capsys):
    display = ProgressDisplay(Clock().throughput, total_steps=100, start_step=40)
    display.show_phase("compiling")
    display.show_phase("compiling")
    display.show_phase()
    assert capsys.readouterr().err == "step 40/100  compiling\n"


def test_a_disabled_display_shows_nothing(capsys):
    display = ProgressDisplay(Clock().throughput, total_steps=100, enabled=False)
    display.show_phase("compiling")
    display.write(10, {"loss": 1})
    display.write(10, {"auc": 1}, prefix="valid")
    display.close()
    assert capsys.readouterr() == ("", "")
