"""Choose the item vectors that semantic ids are made of."""

from __future__ import annotations

from typing import Literal

import numpy as np

from tokenrec.data.dataset import Dataset
from tokenrec.semantic_ids.cooccurrence import cooccurrence_vectors
from tokenrec.semantic_ids.text_vectors import text_vectors
from tokenrec.semantic_ids.train_events import TrainEvents
from tokenrec.semantic_ids.vectors import ItemVectors, nearest_rows, normalize

VectorKind = Literal["cooccurrence", "text", "both"]

# Items by text whose co-occurrence vectors stand in for that of an item without one.
NEIGHBOURS = 10


def item_vectors(
    dataset: Dataset, events: TrainEvents, kind: VectorKind, seed: int
) -> ItemVectors:
    """Compute vectors of every item of the catalogue.

    Args:
      dataset: the prepared data set.
      events: events of its training split.
      kind: "cooccurrence", "text", or "both" side by side, each half with half of the
        squared length. With "both" an item without a co-occurrence vector takes the
        mean of those of the items nearest to it by text, so that its semantic id lies
        among theirs.
      seed: random seed.

    Raises:
      InputError: no item gets a vector, or there is no text (see `text_vectors`).
    """
    if kind == "text":
        return text_vectors(dataset)
    # Text first: a missing package is an error before the slow part.
    text = text_vectors(dataset) if kind == "both" else None
    items = len(dataset.catalogue.item_id)
    cooccurrence = cooccurrence_vectors(events, items, seed)
    if text is None:
        return cooccurrence
    filled = _fill_by_text(cooccurrence, text)
    return normalize(np.concatenate([filled, text.values], axis=1))


def _fill_by_text(cooccurrence: ItemVectors, text: ItemVectors) -> np.ndarray:
    """Fill missing co-occurrence vectors from the neighbours by text: `[N, D]`."""
    warm = np.flatnonzero(cooccurrence.known & text.known)
    cold = np.flatnonzero(~cooccurrence.known & text.known)
    values = cooccurrence.values.copy()
    if len(warm) and len(cold):
        nearest = nearest_rows(text.values[cold], text.values[warm], NEIGHBOURS)
        means = cooccurrence.values[warm][nearest].mean(axis=1)
        values[cold] = normalize(means).values
    return values
