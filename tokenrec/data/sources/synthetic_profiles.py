"""Generate the synthetic log with many static fields, of known rank and known weight.

It serves the study of collapsed embeddings: how many dimensions static tokens span is
known (`static_rank`), and so is how much they matter for the labels (`static_weight`).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pyarrow as pa

from tokenrec.data.schema import Feature
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.data.sources.synthetic_log import SEGMENTS
from tokenrec.errors import InputError

VALUES = 8


class ProfilesSource(SyntheticSource):
    """`SyntheticSource` with many static fields that take few combinations of values.

    A user has one of `static_rank` profiles. The profile decides the segment, each of
    the `static_fields` categorical fields `field_0`, ..., and a score, evenly spaced
    from -1 to 1, of which `static_weight` times is added to the logit of every label.

    So all static tokens of all users are `static_rank` points, however many fields
    there are, and as one-hot vectors, centred, a matrix of rank `static_rank - 1` or
    less.

    Args:
      rows: length of the log.
      static_rank: number of profiles.
      static_fields: fields of a profile besides the segment.
      static_weight: weight of the profile's score in the logits. With 0, profiles carry
        no more information than the segment does.
      users: distinct users.
      items: distinct items.
      seed: seed of all draws.

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
        for name, value in (
            ("static_rank", static_rank),
            ("static_fields", static_fields),
        ):
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1; raise it")
        if not math.isfinite(static_weight):
            raise InputError(
                f"static_weight={static_weight} must be a finite number; give another "
                "one"
            )
        super().__init__(rows, users, items, seed)
        # The generator's parameters alone do not describe this log.
        self.provenance = SyntheticSource.provenance
        self._fields = [f"field_{number}" for number in range(static_fields)]
        features = tuple(Feature(name, "categorical", "user") for name in self._fields)
        self.schema = dataclasses.replace(
            self.schema, features=features + self.schema.features
        )
        self._rank = static_rank
        user = np.arange(users)
        self._profile = self._draws.integers("profile", user, static_rank)
        # The last user is in no table: without features, no profile may show in the
        # labels.
        is_last = user == users - 1
        self._segment = np.where(is_last, -1, self._profile % SEGMENTS)
        scores = np.linspace(-1, 1, static_rank) if static_rank > 1 else np.zeros(1)
        score = np.where(self._segment < 0, 0, scores[self._profile])
        self._added_logit = static_weight * score

    def users(self) -> pa.Table:
        table = super().users()
        for name in self._fields:
            # Profiles in a random order, so that up to `VALUES` of them differ in every
            # field.
            order = self._draws.uniform(name, np.arange(self._rank))
            value = np.argsort(order) % VALUES
            table = table.append_column(name, pa.array(value[self._profile[:-1]]))
        return table

    def probabilities(self, index: np.ndarray) -> np.ndarray:
        """Compute the true probability of each task's label.

        Args:
          index: `[n] int64`, row numbers.

        Returns:
          `[n, tasks] float64`.
        """
        plain = super().probabilities(index)
        added = self._added_logit[index % self._users][:, None]
        logits = np.log(plain / (1 - plain)) + added
        # The sigmoid by tanh, which overflows for no weight.
        return 0.5 * (1 + np.tanh(0.5 * logits))
