"""Choose sizes of a model from the size of its data, for the configs of any data set.

The rules are coarse on purpose: each has a few steps, so that a little more data does
not change a config. `configs/ranker.py` and `configs/retriever.py` use them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenrec.data.metadata import Metadata

# The fewest and the most steps of a run.
_STEPS = (200, 100_000)
# Steps until the learning rate is reached: few enough for the shortest run, in which a
# sample may hold many labelled rows.
WARMUP_STEPS = 5


@dataclasses.dataclass(frozen=True)
class DataSizes:
    """Sizes of the training split of a prepared data set.

    Attributes:
      labelled: log rows to learn from, those with unknown labels included.
      events: log rows that enter histories.
      users: users of all splits.
      items: items of the catalogue.
      has_valid: whether there is a valid split, on which checkpoints are compared.
    """

    labelled: int
    events: int
    users: int
    items: int
    has_valid: bool


# Stands for a data set as long as none is named: MovieLens-1M, about.
EXAMPLE_SIZES = DataSizes(1_000_000, 1_000_000, 6_000, 4_000, True)


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Width and depth of a model, and the batch that goes with them."""

    width: int
    layers: int
    batch_size: int

    @property
    def heads(self) -> int:
        """Attention heads: two at least, of width 32 where there are more."""
        return max(self.width // (64 if self.width > 128 else 32), 2)


def data_sizes(data: Metadata | None) -> DataSizes:
    """Read the sizes of a data set; `EXAMPLE_SIZES` where none is named."""
    if data is None:
        return EXAMPLE_SIZES
    counts = data.counts
    return DataSizes(
        labelled=counts.get("learned_train", 0),
        events=counts.get("events_train", 0),
        users=counts.get("users", 0),
        items=counts.get("items", 0),
        has_valid=counts.get("scored_valid", 0) > 0,
    )


def model_size(examples: int) -> ModelSize:
    """Choose a model for a number of training examples.

    >>> model_size(80_000)
    ModelSize(width=32, layers=2, batch_size=256)
    """
    if examples < 100_000:
        return ModelSize(32, 2, 256)
    if examples < 5_000_000:
        return ModelSize(64, 4, 256)
    if examples < 100_000_000:
        return ModelSize(128, 6, 1024)
    return ModelSize(256, 8, 4096)


def fitting_batch(batch_size: int, samples: int) -> int:
    """A batch of a short log: a power of two, at most a quarter of its samples.

    It is at least 8, so that the devices of one host can share it.

    >>> fitting_batch(64, 40_000), fitting_batch(64, 100)
    (64, 16)
    """
    while batch_size > max(samples // 4, 8):
        batch_size //= 2
    return batch_size


def history_events(sizes: DataSizes) -> int:
    """Choose the length of histories: a power of two, at least twice the mean.

    It lies between 16 and 64; up to 128 where there are many events to learn from.

    >>> history_events(DataSizes(80_000, 80_000, 900, 1_700, True))
    64
    """
    mean = sizes.events / max(sizes.users, 1)
    most = 64 if sizes.events < 5_000_000 else 128
    events = 16
    while events < min(2 * mean, most):
        events *= 2
    return events


def shrinking_windows(layers: int, events: int) -> tuple[int, ...]:
    """Windows of the upper half of the layers, each half of the one below.

    >>> shrinking_windows(4, 64)
    (32, 16)
    """
    return tuple(max(events >> (i + 1), 4) for i in range(max(layers // 2, 1)))


def fitting_epochs(epochs: float, samples: int, batch_size: int) -> float:
    """Epochs of a log, more of a short one and fewer of a very long one.

    They are those of 200 to 100,000 batches, as far as the counts of a data set tell.

    >>> fitting_epochs(2, 80_000, 256), fitting_epochs(2, 4_000, 256)
    (2.0, 12.8)
    """
    per_epoch = max(samples, 1) / batch_size
    least, most = _STEPS
    return round(min(max(float(epochs), least / per_epoch), most / per_epoch), 3)


def evaluation_steps(epochs: float, samples: int, batch_size: int) -> int:
    """Steps between two of about five evaluations.

    >>> evaluation_steps(2, 80_000, 256), evaluation_steps(2, 4_000, 256)
    (125, 50)
    """
    return max(round(epochs * samples / batch_size / 5), 50)
