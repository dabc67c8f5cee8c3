"""Compute mean and standard deviation of dense features, block by block."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from tokenrec.data.preparation.exact_sums import ExactSums
from tokenrec.data.schema import MISSING, Feature, columns


class Moments:
    """Mean and deviation of each transformed dense feature, without missing values.

    Attributes:
      missing: for each feature, the number of rows in which it is missing: no id of an
        integer feature is known, or a number of another is none.
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        place = columns(features)
        layout = place.dense
        self._slices = {name: slice(*span) for name, span in layout.items()}
        self._id_slices = {name: slice(*span) for name, span in place.ids.items()}
        self.missing = {feature.name: 0 for feature in features}
        # Embeddings are counted but not normalised: their maker applies an RMSNorm.
        self._columns = [(f, layout[f.name][0]) for f in features if f.kind == "dense"]
        self._sums = [ExactSums() for _ in self._columns]

    def add(self, ids: np.ndarray, dense: np.ndarray) -> None:
        """Add rows of the features' matrices.

        Args:
          ids: `[n, I] int32`; 0 is missing.
          dense: `[n, D] float32`; NaN is missing.
        """
        for name, place in self._id_slices.items():
            self.missing[name] += int((ids[:, place] == MISSING).all(axis=1).sum())
        for name, place in self._slices.items():
            self.missing[name] += int(np.isnan(dense[:, place]).any(axis=1).sum())
        for i, (feature, column) in enumerate(self._columns):
            values = dense[:, column]
            values = values[~np.isnan(values)]
            if feature.transform == "log1p":
                wide = values.astype(np.float64)
                values = np.sign(wide) * np.log1p(np.abs(wide))
            self._sums[i].add(values.astype(np.float32))

    def merge(self, other: Moments) -> None:
        """Add the rows of `other`, which has the same features."""
        for name, count in other.missing.items():
            self.missing[name] += count
        for ours, theirs in zip(self._sums, other._sums, strict=True):
            ours.merge(theirs)

    def features(self) -> dict[str, Feature]:
        """Return the dense features with their `mean` and `deviation`.

        The deviation of a constant feature is 1, so that normalisation maps it to 0. A
        feature that never has a value gets mean 0 and deviation 1.
        """
        normalised = {}
        for i, (feature, _) in enumerate(self._columns):
            mean, deviation = 0.0, 0.0
            if self._sums[i].count:
                mean, variance = self._sums[i].mean_and_variance()
                deviation = math.sqrt(variance)
            # Below this a deviation is no more than the float32 rounding of a constant.
            if deviation <= 1e-7 * abs(mean):
                deviation = 1.0
            normalised[feature.name] = dataclasses.replace(
                feature, mean=mean, deviation=deviation
            )
        return normalised
