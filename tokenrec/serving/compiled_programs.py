"""The programs of an artifact, compiled once for each of their sizes.

What a start with a warm cache of compiled programs takes is not to read them: JAX traces
each size, fills the sizes into the program, and looks for what XLA made of it. Most of
that is not Python, so threads share it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

type Arrays = dict[str, Any]

# Name of a program and its sizes.
type Shape = tuple[Any, ...]


class CompiledPrograms:
    """Programs, their weights, and what was compiled of them.

    `run` and `compile` may be called from one thread at a time.

    Args:
      programs: jitted, by name; of weights and inputs.
      weights: weights on the device.
      device: where programs run.

    Attributes:
      compiles: programs compiled so far, one for each shape.
    """

    def __init__(
        self, programs: Mapping[str, Any], weights: Any, device: jax.Device
    ) -> None:
        self._programs, self._weights, self._device = programs, weights, device
        self._compiled: dict[Shape, Callable[..., Arrays]] = {}
        self._noted: set[Shape] = set()
        self.compiles = 0

    def run(self, name: str, inputs: Arrays, *sizes: int) -> Arrays:
        """Run a program; compile it first where its sizes are new."""
        shape = (name, *sizes)
        if shape not in self._compiled:
            self._keep(shape, self._compile(shape, inputs))
        with jax.default_device(self._device):
            return self._compiled[shape](self._weights, inputs)

    def compile(self, jobs: Iterable[tuple[Shape, Arrays]]) -> None:
        """Compile programs on all cores, without running them.

        Args:
          jobs: shapes, and inputs of those shapes (arrays, or `shapes_of` them). What is
            compiled already is passed over.
        """
        new = [job for job in jobs if job[0] not in self._compiled]
        with ThreadPoolExecutor(_cores()) as pool:
            done = pool.map(lambda job: self._compile(*job), new)
            for (shape, _), program in zip(new, done, strict=True):
                self._keep(shape, program)

    def note(self, shape: Shape) -> None:
        """Count a shape of a function that JAX compiles when it is called."""
        if shape not in self._noted:
            self._noted.add(shape)
            self.compiles += 1

    def _compile(self, shape: Shape, inputs: Arrays) -> Callable[..., Arrays]:
        # The default device is a setting of each thread.
        with jax.default_device(self._device):
            lowered = self._programs[shape[0]].lower(self._weights, inputs)
            program: Callable[..., Arrays] = lowered.compile()
            return program

    def _keep(self, shape: Shape, program: Callable[..., Arrays]) -> None:
        self._compiled[shape] = program
        self.compiles += 1


def shapes_of(arrays: Mapping[str, np.ndarray], size: int) -> Arrays:
    """Shapes of the arrays of one request in a batch of this size."""
    return {
        name: jax.ShapeDtypeStruct((size, *array.shape), array.dtype)
        for name, array in arrays.items()
    }


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
