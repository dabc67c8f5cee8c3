"""Load the weights of a checkpoint into the shards of a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from tokenrec.config import Config
from tokenrec.errors import InputError
from tokenrec.language.tensor_files import DTYPES, TensorFiles, open_tensor_files
from tokenrec.language.weight_names import (
    INPUTS,
    OUTPUTS,
    Naming,
    WeightLayout,
    find_naming,
    weight_layouts,
)

# Problems that an error lists; one wrong size gives one for each layer.
_LISTED = 5


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What of a checkpoint and of the wanted weights did not go together.

    Attributes:
      unused: tensors that no weight was made of, such as those of a vision tower.
      missing: wanted weights that no such checkpoint has, such as adapters and heads;
        they have to come from elsewhere.
    """

    unused: tuple[str, ...]
    missing: tuple[str, ...]


def load_weights(
    folder: Path, config: Config, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, jax.Array], LoadReport]:
    """Load weights of a language model from a checkpoint.

    Each process reads the slices of its own devices out of memory-mapped files, one
    weight after the other, so that no host holds the model.

    Args:
      folder: folder of the checkpoint.
      config: the config, whose sizes are filled in.
      wanted: name of a weight -> its shape, type and sharding; without a sharding it
        goes to the first device. Word vectors may have more rows than the checkpoint;
        those rows are zero.

    Returns:
      The weights of `wanted` that are part of such a checkpoint, in its order, and what
      was left over on both sides.

    Raises:
      InputError: the files are damaged, or weights are missing or of another shape or
        type; the message lists them.
      StorageError: the storage is at fault, again and again.
    """
    files = open_tensor_files(folder)
    try:
        naming = find_naming(files.tensors)
    except InputError as error:
        raise InputError(f"folder '{folder}': {error}") from error
    layouts = weight_layouts(config.model)
    found = {name: layouts[name] for name in wanted if name in layouts}
    problems = [
        problem
        for name, layout in found.items()
        for problem in _problems(name, layout, wanted[name], files, naming)
    ]
    if problems:
        more = len(problems) - _LISTED
        lines = problems[:_LISTED] + ([f"and {more} more"] if more > 0 else [])
        raise InputError(
            f"the weights of '{folder}' do not fit model.kind='{config.model.kind}' "
            "and the sizes of the config; give the checkpoint that the config was read "
            "from:\n  " + "\n  ".join(lines)
        )
    arrays = {
        name: _load(files, naming, layout, wanted[name])
        for name, layout in found.items()
    }
    used = {naming.full(each) for layout in found.values() for each in layout.tensors}
    return arrays, LoadReport(
        unused=tuple(sorted(files.tensors.keys() - used)),
        missing=tuple(name for name in wanted if name not in layouts),
    )


def _problems(
    name: str,
    layout: WeightLayout,
    wanted: jax.ShapeDtypeStruct,
    files: TensorFiles,
    naming: Naming,
) -> Iterator[str]:
    """Yield why a weight cannot be loaded."""
    shape, rows = layout.shape, wanted.shape[:1]
    if name in (INPUTS, OUTPUTS) and rows >= shape[:1]:
        shape = (*rows, *shape[1:])
    if wanted.shape != shape:
        yield f"{name} is {list(wanted.shape)}, and the sizes give {list(shape)}"
    for each in layout.tensors:
        tensor = files.tensors.get(naming.full(each))
        if tensor is None:
            yield f"'{naming.full(each)}' is missing ({name})"
        elif tensor.shape != layout.stored:
            yield (
                f"'{naming.full(each)}' is {list(tensor.shape)}, and the sizes give "
                f"{list(layout.stored)} ({name})"
            )
        elif tensor.dtype not in DTYPES:
            yield (
                f"'{naming.full(each)}' is of type {tensor.dtype}, none of "
                f"{', '.join(DTYPES)} ({name})"
            )


def _load(
    files: TensorFiles,
    naming: Naming,
    layout: WeightLayout,
    wanted: jax.ShapeDtypeStruct,
) -> jax.Array:
    """Make one weight, of which each device reads its slice."""
    layers = [
        layout.from_stored(files.view(naming.full(each))) for each in layout.tensors
    ]
    read = _reader(layers, layout.stacked, wanted)
    # Devices that hold the same slice share what was read.
    slices: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        bounds = tuple(
            part.indices(length)[:2]
            for part, length in zip(index, wanted.shape, strict=True)
        )
        if bounds not in slices:
            slices[bounds] = read(bounds)
        return slices[bounds]

    sharding = wanted.sharding
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(wanted.shape, sharding, shard, wanted.dtype)


def _reader(
    layers: list[np.ndarray], stacked: bool, wanted: jax.ShapeDtypeStruct
) -> Callable[[tuple[tuple[int, int], ...]], np.ndarray]:
    """A function that copies a slice of a weight, given by its bounds per axis."""

    def read(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        # A copy always: JAX may use the memory of an array as it is, and that of a
        # mapped file must not be written.
        shape = tuple(stop - start for start, stop in bounds)
        out = np.zeros(shape, wanted.dtype)
        if stacked:
            rest = tuple(slice(*pair) for pair in bounds[1:])
            for place, layer in enumerate(range(*bounds[0])):
                out[place] = layers[layer][rest]
            return out
        part = layers[0][tuple(slice(*pair) for pair in bounds)]
        # Rows behind the end of the checkpoint's are left zero.
        out[: len(part)] = part
        return out

    return read
