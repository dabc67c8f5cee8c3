"""The weights of a run as tensors of a checkpoint: split by layer, merged, cast.

An adapter with the matrices A and B turns the projection W into W + alpha / r A B (Hu et
al., *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685, 2021). It is
computed in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import jax
import numpy as np

from tokenrec.config import Config
from tokenrec.errors import InputError
from tokenrec.language.tensor_files import DTYPES, TensorFiles
from tokenrec.language.tensor_writer import TensorSpec
from tokenrec.language.weight_names import (
    INPUTS,
    OUTPUTS,
    TEXT_NAMING,
    WeightLayout,
    find_naming,
    weight_layouts,
)

type Array = np.ndarray | jax.Array
_DOWN, _UP = "_adapter/down", "_adapter/up"


class ExportedTensor(NamedTuple):
    """A tensor to write.

    Attributes:
      spec: its name in the exported checkpoint, its type, and its shape with the extra
        rows of word vectors.
      weight: our name.
      layer: its place in a stacked weight, else 0.
    """

    spec: TensorSpec
    weight: str
    layer: int


@dataclasses.dataclass(frozen=True)
class ModelWeights:
    """The weights of a language model, and where those come from that it lacks.

    Attributes:
      config: the config of the run, whose sizes are filled in.
      params: name -> weight. Word vectors behind row V, which fill a table up, are not
        exported.
      source: the checkpoint that the run started from, which has the weights that
        `params` lacks; None if there is none.
      extra_rows: name of word vectors -> rows `[n, d]` that follow the V words.
    """

    config: Config
    params: Mapping[str, Array]
    source: TensorFiles | None
    extra_rows: Mapping[str, Array]

    def plan(self, dtype: np.dtype | None) -> tuple[ExportedTensor, ...]:
        """List the tensors to write, those of a weight one after the other.

        Args:
          dtype: their type; None for that of the tensor in the source, or else that of
            the weight.

        Raises:
          InputError: weights are missing, or the source has other sizes.
          ValueError: a name, a weight or extra rows do not fit the model.
        """
        layouts = weight_layouts(self.config.model)
        self._check_names(layouts)
        added = self._check_extra_rows(layouts)
        tensors = []
        for name, layout in layouts.items():
            self._check_weight(name, layout)
            for layer, tensor in enumerate(layout.tensors):
                shape = layout.stored
                if name in (INPUTS, OUTPUTS):
                    shape = (shape[0] + added, *shape[1:])
                kind = dtype or self._dtype(name, tensor)
                spec = TensorSpec(TEXT_NAMING.full(tensor), kind, shape)
                tensors.append(ExportedTensor(spec, name, layer))
        return tuple(tensors)

    def compute(self, tensors: Sequence[ExportedTensor]) -> Iterator[np.ndarray]:
        """Yield the numbers of tensors of `plan`; one weight is held at a time."""
        layouts = weight_layouts(self.config.model)
        for name, group in groupby(tensors, key=lambda tensor: tensor.weight):
            layout = layouts[name]
            layers, adapter = self._layers(name, layout), self._adapter(name, layout)
            for tensor in group:
                layer, dtype = layers[tensor.layer], tensor.spec.dtype
                if adapter is not None:
                    down, up = (matrix[tensor.layer] for matrix in adapter)
                    change = self._scale * np.tensordot(down, up, axes=1)
                    layer = layer.astype(np.float32) + change
                if name in self.extra_rows:
                    extra = np.asarray(self.extra_rows[name]).astype(dtype)
                    yield np.concatenate([layer.astype(dtype), extra])
                else:
                    yield np.ascontiguousarray(layout.to_stored(layer), dtype)

    def left_out(self) -> tuple[str, ...]:
        """Tensors of the source that are not exported, such as a vision tower's."""
        if self.source is None:
            return ()
        naming = find_naming(self.source.tensors)
        read = {
            naming.full(tensor)
            for layout in weight_layouts(self.config.model).values()
            for tensor in layout.tensors
        }
        return tuple(sorted(self.source.tensors.keys() - read))

    @property
    def _scale(self) -> np.float32:
        tuning = self.config.tuning
        return np.float32(tuning.alpha / tuning.rank)

    def _layers(self, name: str, layout: WeightLayout) -> Sequence[np.ndarray]:
        """The weight of each layer, without rows behind row V."""
        if name not in self.params:
            source = self.source
            assert source is not None  # `plan` has checked it.
            naming = find_naming(source.tensors)
            return [
                layout.from_stored(source.view(naming.full(tensor)))
                for tensor in layout.tensors
            ]
        weight: np.ndarray = np.asarray(self.params[name])
        if layout.stacked:
            return list(weight)
        return [weight[: layout.shape[0]] if name in (INPUTS, OUTPUTS) else weight]

    def _adapter(
        self, name: str, layout: WeightLayout
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Both matrices of an adapter in float32, with an axis of layers."""
        if name + _DOWN not in self.params:
            return None
        down: np.ndarray = np.asarray(self.params[name + _DOWN]).astype(np.float32)
        up: np.ndarray = np.asarray(self.params[name + _UP]).astype(np.float32)
        return (down, up) if layout.stacked else (down[None], up[None])

    def _dtype(self, name: str, tensor: str) -> np.dtype:
        """Type of a tensor where none is asked for."""
        if self.source is None:
            return np.dtype(self.params[name].dtype)
        stored = self.source.tensors[find_naming(self.source.tensors).full(tensor)]
        return DTYPES[stored.dtype]

    def _check_names(self, layouts: Mapping[str, WeightLayout]) -> None:
        """Check that no weight of the backbone would be left behind."""
        adapters = {name + part for name in layouts for part in (_DOWN, _UP)}
        unknown = sorted(
            name
            for name in self.params
            if name.startswith("backbone/") and name not in layouts.keys() | adapters
        )
        if unknown:
            raise ValueError(f"weights {unknown} are no part of the model")
        for name in layouts:
            if (name + _DOWN in self.params) != (name + _UP in self.params):
                raise ValueError(f"the adapter of {name} has one matrix of two")

    def _check_extra_rows(self, layouts: Mapping[str, WeightLayout]) -> int:
        """Number of extra rows, the same in all tables of words."""
        if not self.extra_rows:
            return 0
        tables = {INPUTS, OUTPUTS} & layouts.keys()
        width = self.config.model.width
        shapes = {name: np.shape(rows) for name, rows in self.extra_rows.items()}
        counts = {shape[0] for shape in shapes.values() if len(shape) == 2}
        wrong = any(shape[1:] != (width,) for shape in shapes.values())
        if shapes.keys() != tables or len(counts) != 1 or wrong:
            raise ValueError(
                f"extra rows {shapes} must be [n, {width}] for {sorted(tables)}"
            )
        return counts.pop()

    def _check_weight(self, name: str, layout: WeightLayout) -> None:
        """Check that a weight is there, here or in the source, and of its shape."""
        if name in self.params:
            shape = np.shape(self.params[name])
            rows = max(shape[:1], layout.shape[:1]) if name in (INPUTS, OUTPUTS) else ()
            if shape != (*rows, *layout.shape[len(rows) :]):
                raise ValueError(f"{name} is {shape}, and must be {layout.shape}")
        if self.source is None:
            if name not in self.params:
                raise InputError(
                    f"weight {name} is missing; give the checkpoint that the run "
                    "started from"
                )
            return
        naming = find_naming(self.source.tensors)
        for tensor in layout.tensors:
            stored = self.source.tensors.get(naming.full(tensor))
            if stored is None or stored.shape != layout.stored:
                have = "is missing" if stored is None else f"is {list(stored.shape)}"
                raise InputError(
                    f"'{naming.full(tensor)}' of '{self.source.folder}' {have}, and the "
                    f"sizes of the run give {list(layout.stored)}; give the checkpoint "
                    "that the run started from"
                )
            if stored.dtype not in DTYPES:
                raise InputError(
                    f"'{naming.full(tensor)}' of '{self.source.folder}' is of type "
                    f"{stored.dtype}, none of {', '.join(DTYPES)}; convert the checkpoint"
                )
