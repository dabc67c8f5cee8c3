"""Describe a set of semantic ids: use of codes, collisions, errors, neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenrec.data.dataset import Dataset
from tokenrec.data.semantic_id_file import collision_groups
from tokenrec.semantic_ids.rq_kmeans import Quantized
from tokenrec.semantic_ids.text_vectors import item_texts
from tokenrec.semantic_ids.vectors import ItemVectors, nearest_rows

# Items whose neighbours are listed, and neighbours of each.
SAMPLES = 10
NEIGHBOURS = 5


def describe_codes(codes: np.ndarray, sizes: Sequence[int]) -> list[dict[str, float]]:
    """Describe the use of codes per level.

    `entropy_bits` is the entropy of the code of a random item. `perplexity` is 2 to its
    power, the number of codes that would have that entropy if used equally.

    >>> describe_codes(np.array([[0], [0], [3], [3]]), [4])
    [{'codes': 4, 'used': 2, 'perplexity': 2.0, 'entropy_bits': 1.0}]

    Args:
      codes: `[N, L] int32`.
      sizes: size of each level's code book.
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
    """Describe how far the quantised levels `codes: [N, L]` tell items apart.

    `items` share all their codes with another item, and `largest` is the size of the
    largest such group. `distinct[l]` is the number of different prefixes of l + 1
    codes.
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
) -> list[dict[str, float | bool]]:
    """Describe the error of each level.

    `mse` is the mean squared distance from the vectors, and `explained_variance` is 1
    minus its share of their variance. With k-means, `converged` says whether it did.

    Args:
      quantized: codes and errors.
      values: `[N, D]`, the vectors.
    """
    variance = float(np.square(values - values.mean(axis=0)).sum(axis=1).mean())
    levels: list[dict[str, float | bool]] = [
        {
            "mse": float(error),
            "explained_variance": float(1 - error / variance) if variance > 0 else 0.0,
        }
        for error in quantized.errors
    ]
    # RQ-VAE has no such levels.
    for level, converged in zip(levels, quantized.converged, strict=False):
        level["converged"] = converged
    return levels


def describe_neighbours(
    dataset: Dataset,
    vectors: ItemVectors,
    codes: np.ndarray,
    popularity: np.ndarray,
    seed: int,
) -> list[dict[str, Any]]:
    """List neighbours of some items: by vector, and by the longest prefix of codes.

    Of the items that share a prefix the most popular are listed, and `sharing` counts
    all of them.

    Args:
      dataset: the prepared data set.
      vectors: vectors of all items.
      codes: `[N, L] int32`, the quantised levels.
      popularity: `[N]`, train events of each item.
      seed: random seed of the choice of items.
    """
    # 1. Draw items that have a vector.
    known = np.flatnonzero(vectors.known)
    random = np.random.default_rng(seed)
    rows = np.sort(random.choice(known, min(SAMPLES, len(known)), replace=False))

    # 2. Their nearest items by vector; one more, since an item is nearest to itself.
    known_vectors = vectors.values[known]
    nearest = known[nearest_rows(vectors.values[rows], known_vectors, NEIGHBOURS + 1)]

    samples = []
    for row, near in zip(rows, nearest, strict=True):
        # 3. The length of the prefix that each item shares with this one.
        shared = np.cumprod(codes == codes[row], axis=1).sum(axis=1)
        shared[row] = -1
        longest = int(max(shared.max(), 0))
        sharing = np.flatnonzero(shared == longest) if longest else np.zeros(0, int)
        sharing = sharing[np.argsort(-popularity[sharing], kind="stable")]
        others = near[near != row][:NEIGHBOURS]
        samples.append(
            _name_item(dataset, row, popularity)
            | {
                "codes": codes[row].tolist(),
                "nearest": [_name_item(dataset, other, popularity) for other in others],
                "shared_levels": longest,
                "sharing": len(sharing),
                "shared_by": [
                    _name_item(dataset, other, popularity)
                    for other in sharing[:NEIGHBOURS]
                ],
            }
        )
    return _with_texts(dataset, samples)


def _name_item(dataset: Dataset, row: int, popularity: np.ndarray) -> dict[str, Any]:
    return {
        "row": int(row),
        "item_id": dataset.catalogue.item_id[row].item(),
        "train_events": int(popularity[row]),
    }


def _with_texts(
    dataset: Dataset, samples: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Replace the `row` of each item by its text, if it has one."""
    named = []
    for sample in samples:
        named += [sample, *sample["nearest"], *sample["shared_by"]]
    rows = np.array([item["row"] for item in named], np.int64)
    for item, text in zip(named, item_texts(dataset, rows), strict=True):
        del item["row"]
        if text:
            item["text"] = text
    return samples
