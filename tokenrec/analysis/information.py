"""How much states tell of a binary label: mutual information with their k-means cluster (methods.md section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from tokenrec.errors import InputError
from tokenrec.semantic_ids.rq_kmeans import fit_kmeans

CLUSTERS = (50, 100, 200, 500)
SHUFFLES = 20


class Information(NamedTuple):
    """Nats. `raw` of the counts as they are, `shuffled` the mean with shuffled labels, which is bias alone, and
    `corrected` the difference, which may fall a little below 0.
    """

    raw: float
    shuffled: float
    corrected: float


def mutual_information(codes: np.ndarray, labels: np.ndarray) -> float:
    """Mutual information in nats of the counts of two variables: `codes: [n]` and `labels: [n]`, integers from 0.

    >>> round(mutual_information(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1])), 6)
    0.693147
    """
    counts = np.zeros((codes.max() + 1, labels.max() + 1))
    np.add.at(counts, (codes, labels), 1)
    joint = counts / len(codes)
    alone = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    there = joint > 0
    return float(np.sum(joint[there] * np.log(joint[there] / alone[there])))


def label_information(
    codes: np.ndarray, labels: np.ndarray, *, seed: int, shuffles: int = SHUFFLES
) -> Information:
    """Information of `codes: [n]` on `labels: [n]`, corrected by what shuffled labels seem to have."""
    raw, random = mutual_information(codes, labels), np.random.default_rng(seed)
    shuffled = float(
        np.mean(
            [
                mutual_information(codes, random.permutation(labels))
                for _ in range(shuffles)
            ]
        )
    )
    return Information(raw, shuffled, raw - shuffled)


def cluster_information(
    states: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int,
    clusters: Sequence[int] = CLUSTERS,
) -> dict[int, Information]:
    """Information of the k-means cluster of a state on its label, by number of clusters.

    Args:
      states: `[n, d]`, clustered as they are, not standardised.
      labels: `[n]`, 1, 0, or below 0 where unknown; rows without a label are left out.
      seed: of the clusters and the shuffles.

    Raises:
      InputError: fewer rows with a label than clusters, or a number that is not finite.
    """
    known = labels >= 0
    kept, truth = np.asarray(states, np.float32)[known], labels[known].astype(int)
    if len(kept) < max(clusters, default=0):
        raise InputError(
            f"{len(kept)} states have a label, too few for {max(clusters)} clusters; read more rows"
        )
    if not np.isfinite(kept).all():
        raise InputError(
            "states hold values that are not finite; measure a model whose loss is finite"
        )
    found = {}
    for count in clusters:
        codes = fit_kmeans(
            kept, count, jax.random.fold_in(jax.random.key(seed), count)
        )[1]
        found[count] = label_information(codes, truth, seed=seed)
    return found
