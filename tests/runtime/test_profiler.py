"""Traces of some steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tokenrec.runtime.profiler import profile_steps


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Calls of the profiler, in place of a trace."""
    names: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: names.append(path))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: names.append("stop"))
    return names


def train(profiler, steps, calls):
    for step in steps:
        profiler.before_step(step)
        calls.append(str(step))
        profiler.after_step(step, jnp.ones(3))


def test_the_chosen_steps_are_inside_the_trace(tmp_path, calls):
    with profile_steps(tmp_path, first=2, count=3) as profiler:
        train(profiler, range(7), calls)
    start = str(tmp_path / "profile")
    assert calls == ["0", "1", start, "2", "3", "4", "stop", "5", "6"]


def test_a_run_that_ends_inside_the_trace_stops_it(tmp_path, calls):
    def run():
        with profile_steps(tmp_path, first=1, count=9) as profiler:
            train(profiler, range(3), calls)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        run()
    assert calls[-1] == "stop"


def test_no_steps_are_no_trace(tmp_path, calls):
    with profile_steps(tmp_path, first=1, count=0) as profiler:
        train(profiler, range(3), calls)
    assert calls == ["0", "1", "2"]


def test_a_real_trace_is_in_the_folder_of_the_run(tmp_path):
    step_fn = jax.jit(lambda x: x * 2)
    with profile_steps(tmp_path, first=1, count=2) as profiler:
        for step in range(4):
            profiler.before_step(step)
            profiler.after_step(step, step_fn(jnp.ones(3)))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
