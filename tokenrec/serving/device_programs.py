"""Run the programs of an artifact on one device, with its weights.

Requests are computed together, and a program is compiled once for each pair of sizes:
requests are filled up to the next size of a bucket.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from tokenrec.serving.artifact import Artifact
from tokenrec.serving.program_files import load_program

BATCH_BUCKETS = (1, 2, 4, 8, 16)

type Arrays = dict[str, Any]

# Name of a program and its sizes.
type Shape = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What a request keeps between `prefill` and the program after it.

    Attributes:
      arrays: `[1, ...]` each, of the scorer or retriever that made them.
      nbytes: bytes of all of them.
    """

    arrays: Arrays
    nbytes: int


class DevicePrograms:
    """The programs and weights of an artifact on one device.

    Args:
      artifact: the artifact.
      device: the device.
      parts: fields of the manifest that name weights.

    Attributes:
      weights: the weights on the device, by part and name.
      compiles: programs compiled so far, one for each pair of sizes.
      on_host: arrays of the device are memory of the host.
    """

    def __init__(
        self, artifact: Artifact, device: jax.Device, parts: Sequence[str]
    ) -> None:
        manifest = artifact.manifest
        self.compiles = 0
        # On a CPU arrays of the device are memory of the host: NumPy is faster.
        self.on_host = device.platform == "cpu"
        self._device = device
        self._programs: dict[str, Any] = {
            name: load_program(artifact, file)
            for name, file in manifest["programs"].items()
        }
        self._split = jax.jit(_split)
        self._join = jax.jit(_join)
        self._compiled: dict[Shape, Callable[..., Arrays]] = {}
        self._joined: set[Shape] = set()
        self.weights = jax.device_put(
            {
                part: {
                    name: artifact.read_array(file)
                    for name, file in manifest[part].items()
                }
                for part in parts
            },
            device,
        )

    def run(self, name: str, inputs: Arrays, *sizes: int) -> Arrays:
        """Run a program; compile it where its sizes are new."""
        shape = (name, *sizes)
        program = self._compiled.get(shape)
        if program is None:
            program = self._keep(shape, self._compile(shape, inputs))
        with jax.default_device(self._device):
            return program(self.weights, inputs)

    def prefill(
        self, requests: Sequence[Arrays], buckets: Sequence[int]
    ) -> list[Prefix]:
        """Compute what requests keep.

        Args:
          requests: encoded user and history of each.
          buckets: numbers of requests that programs are compiled for.
        """
        prefixes: list[Prefix] = []
        for part in slices(requests, buckets[-1]):
            size = bucket(len(part), buckets)
            filled = fill_up(part, size)
            inputs = {
                name: np.stack([arrays[name] for arrays in filled]) for name in part[0]
            }
            prefixes += self.split(self.run("prefill", inputs, size), len(part), size)
        return prefixes

    def compile_all(self, jobs: Iterable[tuple[Shape, Arrays]]) -> None:
        """Compile programs for the shapes of some inputs, on several threads.

        Args:
          jobs: name and sizes of each program, and its inputs or their shapes.
        """
        new = [job for job in jobs if job[0] not in self._compiled]
        # What takes long is not Python: reading programs from the cache of compiled
        # ones, or compiling them.
        with ThreadPoolExecutor(_threads()) as pool:
            compiled = pool.map(lambda job: self._compile(*job), new)
            for (shape, _), program in zip(new, compiled, strict=True):
                self._keep(shape, program)

    def split(self, kept: Arrays, count: int, size: int) -> list[Prefix]:
        """Take the results of `prefill` for `size` requests apart; keep `count`."""
        if self.on_host:
            host = {name: np.asarray(array) for name, array in kept.items()}
            # Copies: a view would keep the requests beside it in memory.
            parts = [
                {name: array[i : i + 1].copy() for name, array in host.items()}
                for i in range(count)
            ]
        else:
            self._note(("split", size))
            parts = self._split(kept)[:count]
        return [
            Prefix(part, sum(array.nbytes for array in part.values())) for part in parts
        ]

    def join(self, prefixes: Sequence[Prefix], size: int) -> Arrays:
        """Put the prefixes of `size` requests together."""
        parts = [prefix.arrays for prefix in prefixes]
        if self.on_host:
            return {
                name: np.concatenate([part[name] for part in parts])
                for name in parts[0]
            }
        self._note(("join", size))
        joined: Arrays = self._join(parts)
        return joined

    def _compile(self, shape: Shape, inputs: Arrays) -> Callable[..., Arrays]:
        """Compile a program for the shapes of some inputs; any thread may do so."""
        with jax.default_device(self._device):
            program: Callable[..., Arrays] = (
                self._programs[shape[0]].lower(self.weights, inputs).compile()
            )
        return program

    def _keep(
        self, shape: Shape, program: Callable[..., Arrays]
    ) -> Callable[..., Arrays]:
        """Keep a compiled program, and count it."""
        self._compiled[shape] = program
        self.compiles += 1
        return program

    def _note(self, shape: Shape) -> None:
        """Count the programs of prefixes on the device where their sizes are new."""
        if shape not in self._joined:
            self._joined.add(shape)
            self.compiles += 1


def slices[T](items: Sequence[T], most: int) -> list[Sequence[T]]:
    """Cut a sequence into parts of at most `most`."""
    return [items[start : start + most] for start in range(0, len(items), most)]


def fill_up[T](items: Sequence[T], size: int) -> list[T]:
    """Repeat the first item until there are `size` of them."""
    return [*items, *[items[0]] * (size - len(items))]


def bucket(count: int, buckets: Sequence[int]) -> int:
    """The least bucket that holds so many."""
    return buckets[bisect.bisect_left(buckets, count)]


def batch_shapes(arrays: Arrays, size: int) -> Arrays:
    """Shapes of the arrays of one request in a batch of this size."""
    return {
        name: jax.ShapeDtypeStruct((size, *array.shape), array.dtype)
        for name, array in arrays.items()
    }


def _threads() -> int:
    """Threads that compile: one for each core that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _split(kept: Arrays) -> list[Arrays]:
    size = len(next(iter(kept.values())))
    return [
        {name: array[i : i + 1] for name, array in kept.items()} for i in range(size)
    ]


def _join(parts: list[Arrays]) -> Arrays:
    return {
        name: jax.numpy.concatenate([part[name] for part in parts]) for name in parts[0]
    }
