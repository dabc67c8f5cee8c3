"""Build the semantic ids of a prepared data set, for `tokenrec semantic-ids`.

1. Give every item a vector, from co-occurrence, text, or both (item_vectors.py).
2. Quantise the vectors to codes, coarse to fine (rq_kmeans.py, rq_vae.py).
3. Number the items without a vector, and add a last level where items still have the
   same codes (collisions.py).
4. Describe the result (report.py).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.semantic_id_file import SEMANTIC_IDS, SemanticIds, save_semantic_ids
from tokenrec.errors import InputError, suggest
from tokenrec.runtime.files import write_json
from tokenrec.runtime.paths import local_path
from tokenrec.semantic_ids import report
from tokenrec.semantic_ids.collisions import disambiguate
from tokenrec.semantic_ids.item_vectors import VectorKind, item_vectors
from tokenrec.semantic_ids.rq_kmeans import Quantized, fit_rq_kmeans
from tokenrec.semantic_ids.rq_vae import fit_rq_vae
from tokenrec.semantic_ids.train_events import train_events
from tokenrec.semantic_ids.vectors import ItemVectors

Method = Literal["rq_kmeans", "rq_vae"]

REPORT = "report.json"


def build_semantic_ids(
    data: Path,
    out: Path,
    *,
    method: Method = "rq_kmeans",
    vectors: VectorKind = "cooccurrence",
    levels: int = 4,
    codes: int = 256,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `semantic_ids.parquet` and `report.json`, and return the report.

    Every item of the catalogue gets codes. Items without a vector (with co-occurrence:
    never near another item in train) have the last code of the first level to
    themselves, and the other levels number them, popular items first.

    Args:
      data: folder of the prepared data set.
      out: folder to write to; it is made if need be.
      method: "rq_kmeans" or "rq_vae" (docs/methods.md section 2).
      vectors: "cooccurrence" of train events, "text" of the catalogue, or "both".
      levels: quantised levels. If items still have the same codes, one more level tells
        them apart.
      codes: size of each level's code book.
      seed: random seed; one seed gives one result on one kind of device.
      overwrite: replace semantic ids at `out`.

    Raises:
      InputError: an option is wrong, `out` holds semantic ids, or the data set cannot
        give such vectors.
    """
    _check_options(method, vectors, levels, codes, seed)
    out = local_path(out, "out")
    _check_out(out, overwrite)
    dataset = open_dataset(local_path(data, "data"))
    full, result = _build(dataset, method, vectors, levels, codes, seed)
    # The ids come last: their file is there only with its report.
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / REPORT, result)
    save_semantic_ids(SemanticIds(dataset.catalogue.item_id, full), out / SEMANTIC_IDS)
    return result


def _build(
    dataset: Dataset,
    method: Method,
    vectors: VectorKind,
    levels: int,
    codes: int,
    seed: int,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Compute the codes of all items, `[N, L] int32`, and the report.

    Args:
      dataset: the prepared data set.
      method: see `build_semantic_ids`, as for all others.
      vectors: kind of vectors.
      levels: quantised levels.
      codes: size of each level's code book.
      seed: random seed.
    """
    times = [time.monotonic()]

    # 1. Vectors.
    events = train_events(dataset)
    items = len(dataset.catalogue.item_id)
    popularity = np.bincount(events.item, minlength=items)
    by_item = item_vectors(dataset, events, vectors, seed)
    times.append(time.monotonic())

    # 2. Codes of the items with a vector.
    known = by_item.values[by_item.known]
    quantized = _quantize(method, known, _book_sizes(by_item, levels, codes), seed)
    times.append(time.monotonic())

    # 3. Codes of all items.
    prefixes = _all_codes(quantized, by_item, popularity, levels, codes)
    full = disambiguate(prefixes, popularity)

    # 4. The report. The size of a last level that numbers collisions is that of the
    #    largest collision.
    last_levels = [int(full[:, -1].max()) + 1] * (full.shape[1] - levels)
    sizes = [codes] * levels + last_levels
    neighbours = report.describe_neighbours(
        dataset, by_item, prefixes, popularity, seed
    )
    times.append(time.monotonic())
    result: dict[str, Any] = {
        "items": items,
        "method": method,
        "vectors": vectors,
        "seed": seed,
        "levels": full.shape[1],
        "quantized_levels": levels,
        "codes_per_level": sizes,
        "per_level": report.describe_codes(full, sizes),
        "collisions": report.describe_collisions(prefixes),
        "reconstruction": report.describe_reconstruction(quantized, known),
        "never_seen": int((popularity == 0).sum()),
        "without_vector": int((~by_item.known).sum()),
        "seconds": _seconds(times),
        "neighbours": neighbours,
    }
    return full, result


def _seconds(times: list[float]) -> dict[str, float]:
    """Duration of each stage, given the times at which they begin and end."""
    stages = ("vectors", "quantize", "report")
    return {
        stage: round(end - start, 2)
        for stage, start, end in zip(stages, times[:-1], times[1:], strict=True)
    }


def _book_sizes(vectors: ItemVectors, levels: int, codes: int) -> list[int]:
    """Size of each level's code book; items without a vector take one of the first."""
    if vectors.known.all():
        return [codes] * levels
    return [codes - 1] + [codes] * (levels - 1)


def _all_codes(
    quantized: Quantized,
    vectors: ItemVectors,
    popularity: np.ndarray,
    levels: int,
    codes: int,
) -> np.ndarray:
    """Codes of all items, with and without a vector: `[N, levels] int32`."""
    result = np.empty((len(vectors.known), levels), np.int32)
    result[vectors.known] = quantized.codes
    unknown = np.flatnonzero(~vectors.known)
    by_popularity = unknown[np.argsort(-popularity[unknown], kind="stable")]
    result[by_popularity] = number_items(len(unknown), levels, codes)
    return result


def number_items(count: int, levels: int, codes: int) -> np.ndarray:
    """Make codes for items that only a number tells apart.

    The first code is the last one of its level. The others are the digits of the number
    to the base `codes`, and start again when they are used up.

    >>> number_items(3, 3, 2).tolist()
    [[1, 0, 0], [1, 0, 1], [1, 1, 0]]

    Args:
      count: number of items.
      levels: codes of an item.
      codes: size of each level's code book.

    Returns:
      `[count, levels] int32`.
    """
    place_values = codes ** np.arange(levels - 1)[::-1]
    digits = np.arange(count)[:, None] // place_values % codes
    first = np.full((count, 1), codes - 1)
    return np.concatenate([first, digits], axis=1).astype(np.int32)


def _quantize(
    method: Method, values: np.ndarray, sizes: list[int], seed: int
) -> Quantized:
    fit = fit_rq_kmeans if method == "rq_kmeans" else fit_rq_vae
    return fit(values, sizes, seed)


def _check_options(
    method: str, vectors: str, levels: int, codes: int, seed: int
) -> None:
    for name, value, choices in (
        ("method", method, get_args(Method)),
        ("vectors", vectors, get_args(VectorKind)),
    ):
        if value not in choices:
            raise InputError(
                f"{name}='{value}' is not a choice{suggest(value, choices)}"
            )
    if not 1 <= levels <= 8:
        raise InputError(
            f"levels={levels} must be from 1 to 8; items that stay alike get one more "
            "level by themselves"
        )
    if not 2 <= codes <= 65536:
        raise InputError(f"codes={codes} must be from 2 to 65536; 256 is usual")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed} must be from 0 to 2^32 - 1")


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(
            f"out='{out}' is a file; give the folder to write {SEMANTIC_IDS} and "
            f"{REPORT} to"
        )
    for name in (SEMANTIC_IDS, REPORT):
        if (out / name).exists() and not overwrite:
            raise InputError(
                f"out='{out}' holds {name}; give another folder, or replace it with "
                "--overwrite"
            )
