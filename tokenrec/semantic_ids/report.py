"""What a set of semantic ids is like: use of the codes, collisions, reconstruction, neighbours of sample items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenrec.data.dataset import Dataset
from tokenrec.data.semantic_id_file import collision_groups
from tokenrec.semantic_ids.rq_kmeans import Quantized
from tokenrec.semantic_ids.vectors import ItemVectors, item_texts, nearest_rows

SAMPLES = 10
NEIGHBOURS = 5


def describe_codes(codes: np.ndarray, sizes: Sequence[int]) -> list[dict[str, float]]:
    """Per level of `codes: [N, L]`: codes there are, codes used, and the entropy of their use.

    `entropy_bits` is that of a code drawn with its item at random, `perplexity` is 2 to its power: the number of codes
    that, used equally, would have that entropy.

    >>> describe_codes(np.array([[0], [0], [3], [3]]), [4])
    [{'codes': 4, 'used': 2, 'perplexity': 2.0, 'entropy_bits': 1.0}]
    """
    levels = []
    for column, size in zip(codes.T, sizes, strict=True):
        counts = np.bincount(column, minlength=size)
        share = counts[counts > 0] / len(codes)
        entropy = max(float(-(share * np.log2(share)).sum()), 0.0)
        levels.append(
            {
                "codes": size,
                "used": len(share),
                "perplexity": round(2**entropy, 3),
                "entropy_bits": round(entropy, 4),
            }
        )
    return levels


def describe_collisions(codes: np.ndarray) -> dict[str, Any]:
    """How far the quantised levels `codes: [N, L]` tell items apart, before a last level does.

    `items` share all their codes with another item, `largest` of them with each other; `distinct[l]` is the number of
    different prefixes of l + 1 codes.
    """
    counts = np.bincount(collision_groups(codes))
    distinct = [
        int(collision_groups(codes[:, : level + 1]).max()) + 1
        for level in range(codes.shape[1])
    ]
    return {
        "items": int(counts[counts > 1].sum()),
        "largest": int(counts.max()),
        "distinct": distinct,
    }


def describe_reconstruction(
    quantized: Quantized, values: np.ndarray
) -> list[dict[str, float]]:
    """Per level: mean squared distance from the vectors `values: [N, D]`, and the share of their variance explained."""
    variance = float(np.square(values - values.mean(axis=0)).sum(axis=1).mean())
    return [
        {
            "mse": float(error),
            "explained_variance": float(1 - error / variance) if variance > 0 else 0.0,
        }
        for error in quantized.errors
    ]


def describe_neighbours(
    dataset: Dataset,
    vectors: ItemVectors,
    codes: np.ndarray,
    popularity: np.ndarray,
    seed: int,
) -> list[dict[str, Any]]:
    """For some items with a vector: the nearest by vector, and those that share the longest prefix of codes.

    `codes: [N, L]` are the quantised levels. Of the items that share a prefix the most popular are listed, and
    `sharing` counts all of them.
    """
    known = np.flatnonzero(vectors.known)
    rows = np.sort(
        np.random.default_rng(seed).choice(
            known, min(SAMPLES, len(known)), replace=False
        )
    )
    nearest = known[
        nearest_rows(vectors.values[rows], vectors.values[known], NEIGHBOURS + 1)
    ]
    samples = []
    for row, near in zip(rows, nearest, strict=True):
        same = np.cumprod(codes == codes[row], axis=1).sum(axis=1)
        same[row] = -1
        longest = int(max(same.max(), 0))
        sharing = np.flatnonzero(same == longest) if longest else np.zeros(0, np.int64)
        sharing = sharing[np.argsort(-popularity[sharing], kind="stable")]
        samples.append(
            _named(dataset, row, popularity)
            | {
                "codes": codes[row].tolist(),
                "nearest": [
                    _named(dataset, other, popularity)
                    for other in near[near != row][:NEIGHBOURS]
                ],
                "shared_levels": longest,
                "sharing": len(sharing),
                "shared_by": [
                    _named(dataset, other, popularity) for other in sharing[:NEIGHBOURS]
                ],
            }
        )
    return _with_texts(dataset, samples)


def _named(dataset: Dataset, row: int, popularity: np.ndarray) -> dict[str, Any]:
    return {
        "row": int(row),
        "item_id": dataset.catalogue.item_id[row].item(),
        "train_events": int(popularity[row]),
    }


def _with_texts(
    dataset: Dataset, samples: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Puts the text of each item, where it has one, in the place of its row."""
    named = [
        item
        for sample in samples
        for item in (sample, *sample["nearest"], *sample["shared_by"])
    ]
    texts = item_texts(dataset, np.array([item["row"] for item in named], np.int64))
    for item, text in zip(named, texts, strict=True):
        del item["row"]
        if text:
            item["text"] = text
    return samples
