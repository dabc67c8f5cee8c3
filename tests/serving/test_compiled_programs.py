"""Programs are compiled once for each of their sizes, and give what `jit` gives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenrec.serving.compiled_programs import CompiledPrograms, shapes_of


@pytest.fixture
def traced() -> list[tuple[int, ...]]:
    """Shapes that were traced."""
    return []


@pytest.fixture
def programs(traced: list[tuple[int, ...]]) -> CompiledPrograms:
    def scale(weights: Any, inputs: Any) -> Any:
        traced.append(inputs["x"].shape)
        return {"y": inputs["x"] * weights["w"]}

    device = jax.devices()[0]
    weights = jax.device_put({"w": jnp.arange(3.0)}, device)
    return CompiledPrograms({"scale": jax.jit(scale)}, weights, device)


def test_what_was_compiled_is_not_compiled_again(
    programs: CompiledPrograms, traced: list[tuple[int, ...]]
) -> None:
    row = {"x": np.ones(3, np.float32)}
    jobs = [(("scale", size), shapes_of(row, size)) for size in (1, 2, 4)]
    programs.compile(jobs)
    programs.compile(jobs)
    assert programs.compiles == 3
    assert sorted(traced) == [(1, 3), (2, 3), (4, 3)]
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    found = programs.run("scale", {"x": x}, 4)
    np.testing.assert_array_equal(found["y"], x * np.arange(3))
    assert programs.compiles == 3
    # A size that nobody compiled before is counted.
    programs.run("scale", {"x": x[:3]}, 3)
    assert programs.compiles == 4
    assert traced[3:] == [(3, 3)]


def test_inputs_of_another_size_are_no_silent_compilation(
    programs: CompiledPrograms,
) -> None:
    programs.compile([(("scale", 2), shapes_of({"x": np.ones(3, np.float32)}, 2))])
    with pytest.raises(TypeError):
        programs.run("scale", {"x": np.ones((3, 3), np.float32)}, 2)


def test_a_program_that_cannot_be_compiled_is_raised(
    programs: CompiledPrograms,
) -> None:
    with pytest.raises(ValueError, match="Incompatible shapes"):
        programs.compile([(("scale", 1), shapes_of({"x": np.ones(5, np.float32)}, 1))])
    assert programs.compiles == 0
