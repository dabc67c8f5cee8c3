"""Sizes and positions that the PyTorch peers are built from. It needs no PyTorch.

A peer computes what ours does: the same tokens at the same positions, and in each layer
the same visible pairs. They are read from the layout of our stream, for streams in
which every event is real, as those of the benchmarks are. A peer then needs no padding
mask, which is to its advantage.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from tokenrec.errors import InputError
from tokenrec.models.backbones.bfts import layer_positions, layer_windows
from tokenrec.state import ModelSpec
from tokenrec.tokens.layout import Layout

# How a layer attends: every query sees every key, a square causal mask, or any other.
Kind = Literal["all", "causal", "mask"]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerPlan:
    """The positions and visible pairs of one layer.

    Q queries, whose outputs are computed, and K keys, the inputs of the layer.

    Attributes:
      queries: `[Q]`, index of each query among the K inputs.
      window: keys that a query of a sliding layer sees; None in a full layer.
      query_index: `[Q]`, place of each query in the causal order.
      key_index: `[K]`, the same of the keys.
      query_static: `[Q] bool`, user fields, separator and other tokens before the
        history.
      key_static: `[K] bool`, the same of the keys.
    """

    queries: np.ndarray
    window: int | None
    query_index: np.ndarray
    key_index: np.ndarray
    query_static: np.ndarray
    key_static: np.ndarray

    def mask(self) -> np.ndarray:
        """Which keys each query sees, `[Q, K] bool`."""
        distance = self.query_index[:, None] - self.key_index[None, :]
        seen = distance >= 0
        if self.window is not None:
            hidden = self.key_static[None, :] & ~self.query_static[:, None]
            seen &= (distance < self.window) & ~hidden
        return seen

    @property
    def all_inputs(self) -> bool:
        """Whether every input is a query."""
        return len(self.queries) == len(self.key_index)

    @property
    def kind(self) -> Kind:
        """How the layer attends."""
        mask = self.mask()
        if mask.all():
            return "all"
        square = mask.shape[0] == mask.shape[1]
        return "causal" if square and (mask == np.tri(len(mask))).all() else "mask"


@dataclasses.dataclass(frozen=True, eq=False)
class StreamPlan:
    """The positions of a stream of S tokens, layer by layer.

    Attributes:
      length: S.
      rope: `[S]`, position of each token for its rotation.
      inputs: for each layer the stream positions that enter it, and last those that
        leave the top one.
      layers: bottom first.
      readout: `[R]`, index of each read-out among the last of `inputs`.
    """

    length: int
    rope: np.ndarray
    inputs: tuple[np.ndarray, ...]
    layers: tuple[LayerPlan, ...]
    readout: np.ndarray


def plan_stream(model: ModelSpec) -> StreamPlan:
    """Plan the streams of a model, all of whose events are real.

    Args:
      model: a TokenFormer of ours; `model.needed_rows` decides which tokens each layer
        computes.

    Raises:
      InputError: the visible pairs are not those that the peers compute, as with
        several candidates.
    """
    config, layout = model.config.model, model.layout(model.config.data.events)
    positions = layer_positions(config, layout)
    layers = tuple(
        _plan_layer(layout, inputs, outputs, window)
        for inputs, outputs, window in zip(
            positions, positions[1:], layer_windows(config), strict=False
        )
    )
    every_event = jnp.ones((1, layout.events), bool)
    return StreamPlan(
        length=layout.length,
        rope=np.asarray(layout.rope_positions(every_event))[0],
        inputs=positions,
        layers=layers,
        readout=np.searchsorted(positions[-1], layout.readout),
    )


def _plan_layer(
    layout: Layout, inputs: np.ndarray, outputs: np.ndarray, window: int | None
) -> LayerPlan:
    plan = LayerPlan(
        queries=np.searchsorted(inputs, outputs),
        window=window,
        query_index=layout.index[outputs],
        key_index=layout.index[inputs],
        query_static=layout.static[outputs],
        key_static=layout.static[inputs],
    )
    pattern = layout.pattern(outputs, inputs)
    if not np.array_equal(plan.mask(), pattern.visible(window) | pattern.diagonal()):
        raise InputError(
            "the peers compute streams with at most one candidate, a causal prefix and "
            "hidden static tokens; use data.candidates=1, model.prefix='causal' and "
            "model.discard_static=True"
        )
    return plan


def as_slice(positions: np.ndarray) -> slice:
    """Evenly spaced positions as a slice, which PyTorch takes without a copy.

    Raises:
      InputError: they are not evenly spaced.
    """
    steps = np.unique(np.diff(positions))
    if len(positions) == 0 or len(steps) > 1:
        raise InputError(
            "the peers select evenly spaced tokens only, and those that a layer of "
            "this config needs are not; use model.needed_rows=False"
        )
    step = int(steps[0]) if len(steps) else 1
    return slice(int(positions[0]), int(positions[-1]) + 1, step)
