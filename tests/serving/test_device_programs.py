"""Programs are compiled once for each of their sizes, and give what `jit` gives."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import numpy as np
import pytest

from tokenrec.serving import device_programs
from tokenrec.serving.device_programs import DevicePrograms, batch_shapes


@pytest.fixture
def traced() -> list[tuple[int, ...]]:
    """Shapes that were traced."""
    return []


class OneProgram:
    """An artifact of one program and one weight."""

    manifest: ClassVar[dict[str, Any]] = {
        "programs": {"scale": ""},
        "params": {"w": ""},
    }

    def read_array(self, name: str) -> np.ndarray:
        return np.arange(3, dtype=np.float32)


@pytest.fixture
def programs(
    traced: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> DevicePrograms:
    def scale(weights: Any, inputs: Any) -> Any:
        traced.append(inputs["x"].shape)
        return {"y": inputs["x"] * weights["params"]["w"]}

    monkeypatch.setattr(device_programs, "load_program", lambda *_: jax.jit(scale))
    artifact: Any = OneProgram()
    return DevicePrograms(artifact, jax.devices()[0], ("params",))


def test_what_was_compiled_is_not_compiled_again(
    programs: DevicePrograms, traced: list[tuple[int, ...]]
) -> None:
    row = {"x": np.ones(3, np.float32)}
    jobs = [(("scale", size), batch_shapes(row, size)) for size in (1, 2, 4)]
    programs.compile_all(jobs)
    programs.compile_all(jobs)
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
    programs: DevicePrograms,
) -> None:
    programs.compile_all(
        [(("scale", 2), batch_shapes({"x": np.ones(3, np.float32)}, 2))]
    )
    with pytest.raises(TypeError):
        programs.run("scale", {"x": np.ones((3, 3), np.float32)}, 2)


def test_a_program_that_cannot_be_compiled_is_raised(
    programs: DevicePrograms,
) -> None:
    with pytest.raises(ValueError, match="Incompatible shapes"):
        programs.compile_all(
            [(("scale", 1), batch_shapes({"x": np.ones(5, np.float32)}, 1))]
        )
    assert programs.compiles == 0
