"""Mean and deviation of dense features, gathered block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tokenrec.data.schema import Feature, columns


class Moments:
    """Mean and deviation of each transformed dense feature, missing values left out but counted.

    Attributes:
      missing: name of a dense feature or an embedding -> rows in which it, or a number of it, is missing.

    Blocks are merged by the update of Chan, Golub and LeVeque (1979), which does not cancel.
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        layout = columns(features).dense
        self._places = {name: slice(*place) for name, place in layout.items()}
        self.missing = dict.fromkeys(layout, 0)
        self._columns = [(f, layout[f.name][0]) for f in features if f.kind == "dense"]
        self._count = np.zeros(len(self._columns))
        self._mean = np.zeros(len(self._columns))
        self._squares = np.zeros(len(self._columns))

    def add(self, dense: np.ndarray) -> None:
        """Adds rows of the features' `[n, D] float32` matrix."""
        for name, place in self._places.items():
            self.missing[name] += int(np.isnan(dense[:, place]).any(axis=1).sum())
        for i, (f, column) in enumerate(self._columns):
            values = dense[:, column].astype(np.float64)
            values = values[~np.isnan(values)]
            if not len(values):
                continue
            if f.transform == "log1p":
                values = np.sign(values) * np.log1p(np.abs(values))
            mean = values.mean()
            self._add(i, len(values), mean, np.square(values - mean).sum())

    def merge(self, other: Moments) -> None:
        """Adds the rows that `other`, of the same features, has seen."""
        for name, count in other.missing.items():
            self.missing[name] += count
        for i in range(len(self._columns)):
            if not self._count[i]:  # as it is: the update below would round
                self._count[i], self._mean[i], self._squares[i] = (
                    other._count[i],
                    other._mean[i],
                    other._squares[i],
                )
            elif other._count[i]:
                self._add(i, other._count[i], other._mean[i], other._squares[i])

    def _add(self, i: int, count: float, mean: float, squares: float) -> None:
        total = self._count[i] + count
        shift = mean - self._mean[i]
        self._squares[i] += squares + shift**2 * self._count[i] * count / total
        self._mean[i] += shift * count / total
        self._count[i] = total

    def features(self) -> dict[str, Feature]:
        """The dense features with `mean` and `deviation`; a constant one has deviation 1, an absent one mean 0 too."""
        out = {}
        for i, (f, _) in enumerate(self._columns):
            deviation = (
                float(np.sqrt(self._squares[i] / self._count[i]))
                if self._count[i]
                else 0.0
            )
            negligible = deviation <= 1e-7 * abs(
                float(self._mean[i])
            )  # float32 rounding of a constant
            out[f.name] = dataclasses.replace(
                f, mean=float(self._mean[i]), deviation=1.0 if negligible else deviation
            )
        return out
