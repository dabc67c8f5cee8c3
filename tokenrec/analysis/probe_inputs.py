"""Inputs of the signal probe: the signals of entities, and the random control tokens.

n entities, N tokens of an entity, d their width, e numbers of an entity's transforms.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from tokenrec.data.schema import MISSING, Feature, columns
from tokenrec.errors import InputError
from tokenrec.tokens.feature_transforms import normalize_dense


@dataclasses.dataclass(frozen=True)
class Signal:
    """Values of one signal for n entities.

    Attributes:
      kind: "dense" or "categorical". A semantic id is one categorical signal per level.
      values: `[n]`. Dense: floats, NaN where missing, best given as the model sees
        them, transformed and normalised. Categorical: ids; a missing id is a value like
        others.
    """

    kind: Literal["dense", "categorical"]
    values: np.ndarray


def entity_signals(
    features: tuple[Feature, ...], ids: np.ndarray, dense: np.ndarray
) -> dict[str, Signal]:
    """Make the signals of entities from the columns of their features.

    A dense value is normalised as for the model. A semantic id gives one signal per
    level, an embedding one per number (`code[0]`, `code[1]`). A list or a text, whose
    order a maker does not see, gives one signal: whether it holds its most frequent
    value.

    Args:
      features: features of the entity.
      ids: `[n, I]` integer columns (`tokenrec.data.schema.columns`).
      dense: `[n, D]` float columns.
    """
    place = columns(features)
    signals = {}
    for feature in features:
        source, spans = (ids, place.ids) if feature.is_integer else (dense, place.dense)
        values = source[:, slice(*spans[feature.name])]
        if feature.kind == "categorical":
            signals[feature.name] = Signal("categorical", values[:, 0])
        elif feature.kind == "dense":
            # Column 0 is the normalised value, column 1 the flag of a missing one.
            normalized = np.asarray(normalize_dense(jnp.asarray(values), feature))
            missing = normalized[:, 1] > 0
            signals[feature.name] = Signal(
                "dense", np.where(missing, np.nan, normalized[:, 0])
            )
        elif feature.has_vocabulary or feature.kind == "text":
            # The padding of a list is no value.
            present, counts = np.unique(values[values != MISSING], return_counts=True)
            frequent = present[np.argmax(counts)] if len(present) else MISSING
            contains = (values == frequent).any(axis=1)
            signals[feature.name] = Signal("categorical", contains.astype(np.int32))
        else:
            is_code = feature.kind == "semantic_id"
            kind: Literal["dense", "categorical"] = (
                "categorical" if is_code else "dense"
            )
            for i in range(feature.length):
                signals[f"{feature.name}[{i}]"] = Signal(kind, values[:, i])
    return signals


def random_tokens(
    transforms: np.ndarray, tokens: int, width: int, *, seed: int
) -> np.ndarray:
    """Project the feature transforms of entities to tokens by a fixed Gaussian map.

    The control of the probe: nothing in the map is trained. Its entries have the
    variance 1 / e.

    Args:
      transforms: `[n, e]`, concatenated transforms of an entity's features.
      tokens: number of tokens N.
      width: their width d.
      seed: seed of the map.

    Returns:
      `[n, N, d] float32`.

    Raises:
      InputError: `transforms` is not a matrix.
    """
    if transforms.ndim != 2:
        raise InputError(
            f"transforms have the shape {transforms.shape}, but must be [n, e]; "
            "concatenate them"
        )
    # With variance 1 / e, outputs have the variance of the inputs.
    inputs = transforms.shape[1]
    generator = np.random.default_rng(seed)
    projection = generator.normal(size=(inputs, tokens * width)) / np.sqrt(inputs)
    projected = (transforms.astype(np.float64) @ projection).astype(np.float32)
    return projected.reshape(len(transforms), tokens, width)
