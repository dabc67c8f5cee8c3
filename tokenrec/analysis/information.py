"""Information of states on a binary label, estimated from k-means clusters.

The states are clustered into K clusters; C is the cluster of a state and Y its label.
With joint frequencies `p(c, y)` and marginals `p(c)`, `p(y)`:

    I(C; Y) = sum_{c, y} p(c, y) log(p(c, y) / (p(c) p(y)))        in nats

A finite sample shows information where there is none: for independent C and binary Y by
about (K - 1) / (2n) nats (Miller and Madow). The estimate is therefore corrected by the
mean of the same quantity over shuffled labels, which has the bias alone
(docs/methods.md section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from tokenrec.errors import InputError
from tokenrec.semantic_ids.rq_kmeans import fit_kmeans

CLUSTERS = (50, 100, 200, 500)
# Shuffles of the labels whose mean estimates the bias.
SHUFFLES = 20


class Information(NamedTuple):
    """Mutual information in nats.

    Attributes:
      raw: of the counts as they are.
      shuffled: mean over shuffled labels, an estimate of the bias.
      corrected: `raw - shuffled`; may fall a little below 0.
    """

    raw: float
    shuffled: float
    corrected: float


def mutual_information(codes: np.ndarray, labels: np.ndarray) -> float:
    """Compute the mutual information of two variables from their counts, in nats.

    Args:
      codes: `[n]`, integers from 0.
      labels: `[n]`, integers from 0.

    >>> round(mutual_information(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1])), 6)
    0.693147
    """
    counts = np.zeros((codes.max() + 1, labels.max() + 1))
    np.add.at(counts, (codes, labels), 1)
    joint = counts / len(codes)
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    # A pair that does not occur contributes 0, the limit of p log p.
    occurs = joint > 0
    ratio = joint[occurs] / independent[occurs]
    return float(np.sum(joint[occurs] * np.log(ratio)))


def label_information(
    codes: np.ndarray, labels: np.ndarray, *, seed: int, shuffles: int = SHUFFLES
) -> Information:
    """Estimate the information of codes on labels, corrected for its bias.

    Args:
      codes: `[n]`, integers from 0.
      labels: `[n]`, integers from 0.
      seed: seed of the shuffles.
      shuffles: number of shuffles.
    """
    raw = mutual_information(codes, labels)
    generator = np.random.default_rng(seed)
    of_shuffles = [
        mutual_information(codes, generator.permutation(labels))
        for _ in range(shuffles)
    ]
    shuffled = float(np.mean(of_shuffles))
    return Information(raw, shuffled, raw - shuffled)


def cluster_information(
    states: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int,
    clusters: Sequence[int] = CLUSTERS,
) -> dict[int, Information]:
    """Estimate the information of the k-means cluster of a state on its label.

    Args:
      states: `[n, d]`, clustered without standardisation.
      labels: `[n]`, 1, 0, or below 0 where unknown; such states are left out.
      seed: seed of the clusters and of the shuffles.
      clusters: numbers of clusters K.

    Returns:
      K -> information.

    Raises:
      InputError: there are fewer states with a label than clusters, or a state holds a
        non-finite number.
    """
    known = labels >= 0
    labelled_states = np.asarray(states, np.float32)[known]
    known_labels = labels[known].astype(int)
    if len(labelled_states) < max(clusters, default=0):
        raise InputError(
            f"{len(labelled_states)} states have a label, too few for {max(clusters)} "
            "clusters; read more rows"
        )
    if not np.isfinite(labelled_states).all():
        raise InputError(
            "states hold non-finite values; measure a model whose loss is finite"
        )
    information = {}
    for count in clusters:
        # A key of its own for each K, so that a list of one K gives the same clusters.
        key = jax.random.fold_in(jax.random.key(seed), count)
        codes = fit_kmeans(labelled_states, count, key).assigned
        information[count] = label_information(codes, known_labels, seed=seed)
    return information
