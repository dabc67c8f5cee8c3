"""Compute mean and standard deviation of dense features, block by block.

Blocks are merged by the update of Chan, Golub and LeVeque (Updating Formulae and a
Pairwise Algorithm for Computing Sample Variances, 1979). With count n, mean m and sum
of squared deviations M of two blocks a and b:

    n = n_a + n_b
    m = m_a + (m_b - m_a) n_b / n
    M = M_a + M_b + (m_b - m_a)^2 n_a n_b / n

Unlike a sum of squares, it does not cancel where the mean is large.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

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
        self._count = np.zeros(len(self._columns))
        self._mean = np.zeros(len(self._columns))
        self._squared_deviations = np.zeros(len(self._columns))

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
            # float64: a sum of millions of float32 loses digits.
            values = dense[:, column].astype(np.float64)
            values = values[~np.isnan(values)]
            if not len(values):
                continue
            if feature.transform == "log1p":
                values = np.sign(values) * np.log1p(np.abs(values))
            mean = values.mean()
            self._merge(i, len(values), mean, np.square(values - mean).sum())

    def merge(self, other: Moments) -> None:
        """Add the rows of `other`, which has the same features."""
        for name, count in other.missing.items():
            self.missing[name] += count
        for i in range(len(self._columns)):
            if not self._count[i]:
                # Copy the first block: the update formula would round it.
                self._count[i] = other._count[i]
                self._mean[i] = other._mean[i]
                self._squared_deviations[i] = other._squared_deviations[i]
            elif other._count[i]:
                self._merge(
                    i, other._count[i], other._mean[i], other._squared_deviations[i]
                )

    def _merge(
        self, i: int, count: float, mean: float, squared_deviations: float
    ) -> None:
        """Apply the update of the module's docstring to feature `i`."""
        total = self._count[i] + count
        shift = mean - self._mean[i]
        self._squared_deviations[i] += (
            squared_deviations + shift**2 * self._count[i] * count / total
        )
        self._mean[i] += shift * count / total
        self._count[i] = total

    def features(self) -> dict[str, Feature]:
        """Return the dense features with their `mean` and `deviation`.

        The deviation of a constant feature is 1, so that normalisation maps it to 0. A
        feature that never has a value gets mean 0 and deviation 1.
        """
        normalised = {}
        for i, (feature, _) in enumerate(self._columns):
            mean, deviation = float(self._mean[i]), 0.0
            if self._count[i]:
                deviation = float(np.sqrt(self._squared_deviations[i] / self._count[i]))
            # Below this a deviation is no more than the float32 rounding of a constant.
            if deviation <= 1e-7 * abs(mean):
                deviation = 1.0
            normalised[feature.name] = dataclasses.replace(
                feature, mean=mean, deviation=deviation
            )
        return normalised
