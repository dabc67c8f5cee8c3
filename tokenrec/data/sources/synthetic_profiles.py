"""The synthetic log with more about its users: static fields of a known rank, and of a known weight in the labels."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pyarrow as pa

from tokenrec.data.schema import Feature
from tokenrec.data.sources.synthetic import SEGMENTS, SyntheticSource
from tokenrec.errors import InputError

VALUES = 8


class ProfilesSource(SyntheticSource):
    """`SyntheticSource` with many static fields that take few combinations of values.

    A user has one of `static_rank` profiles. The profile decides the segment, each of the `static_fields` categorical
    fields `field_0`, ..., and a score, evenly spaced from -1 to 1, of which `static_weight` times is added to the
    logit of every label. So all static tokens of all users are `static_rank` points, however many fields there are,
    and as one-hot vectors, centred, a matrix of rank `static_rank - 1` or less.

    Args:
      rows, users, items, seed: of `SyntheticSource`.
      static_rank: profiles.
      static_fields: fields of a profile besides the segment.
      static_weight: of the profile's score in the logits; 0: profiles tell no more than the segment does.

    Raises:
      InputError: a size is too small, or the weight not finite.
    """

    def __init__(
        self,
        rows: int,
        static_rank: int,
        *,
        static_fields: int = 12,
        static_weight: float = 1.0,
        users: int = 200,
        items: int = 100,
        seed: int = 0,
    ) -> None:
        for name, value in {
            "static_rank": static_rank,
            "static_fields": static_fields,
        }.items():
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        if not math.isfinite(static_weight):
            raise InputError(f"static_weight={static_weight} must be a finite number")
        super().__init__(rows, users, items, seed)
        # The generator's parameters alone do not describe this log.
        self.provenance = SyntheticSource.provenance
        self._fields = [f"field_{number}" for number in range(static_fields)]
        features = tuple(Feature(name, "categorical", "user") for name in self._fields)
        self.schema = dataclasses.replace(
            self.schema, features=features + self.schema.features
        )
        self._rank = static_rank
        self._profile = self._draw("profile", np.arange(users), static_rank)
        # The last user is in no table, and what is known of nobody says nothing.
        self._segment = np.where(
            np.arange(users) == users - 1, -1, self._profile % SEGMENTS
        )
        scores = np.linspace(-1, 1, static_rank) if static_rank > 1 else np.zeros(1)
        self._added = static_weight * np.where(
            self._segment < 0, 0, scores[self._profile]
        )

    def users(self) -> pa.Table:
        table = super().users()
        for name in self._fields:
            # Profiles in a random order, so that up to `VALUES` of them differ in every field.
            value = np.argsort(self._uniform(name, np.arange(self._rank))) % VALUES
            table = table.append_column(name, pa.array(value[self._profile[:-1]]))
        return table

    def probabilities(self, index: np.ndarray) -> np.ndarray:
        known = super().probabilities(index)
        logits = np.log(known / (1 - known)) + self._added[index % self._users][:, None]
        return 0.5 * (1 + np.tanh(0.5 * logits))  # no weight is too large for it
