"""Semantic ids of a prepared data set: vectors, residual quantisation, a last level against collisions, a report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from tokenrec.data.dataset import open_dataset
from tokenrec.data.semantic_id_file import SEMANTIC_IDS, SemanticIds, save_semantic_ids
from tokenrec.errors import InputError, suggest
from tokenrec.runtime.files import write_json
from tokenrec.semantic_ids import report
from tokenrec.semantic_ids.collisions import disambiguate
from tokenrec.semantic_ids.rq_kmeans import Quantized, fit_rq_kmeans
from tokenrec.semantic_ids.rq_vae import fit_rq_vae
from tokenrec.semantic_ids.vectors import VectorKind, item_vectors, train_events

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
    """Writes `semantic_ids.parquet` and `report.json` to the folder `out`, and returns the report.

    Every item of the catalogue has a row. Items without a vector (with co-occurrence: never near another one in train)
    have the last code of the first level to themselves, and the other levels number them, popular ones first.

    Args:
      data: folder of the prepared data set.
      out: folder to write to; it is made.
      method: "rq_kmeans" (the default of methods.md section 2) or "rq_vae".
      vectors: "cooccurrence" of train events, "text" of the catalogue, or "both".
      levels: quantised levels. If two items still have the same codes, one more level tells all such apart.
      codes: size of each level's code book.
      seed: of all draws; one seed gives one result.
      overwrite: replace semantic ids at `out`.

    Raises:
      InputError: an option is wrong, `out` holds semantic ids, or the data set cannot give such vectors.
    """
    _check(method, vectors, levels, codes, seed)
    out = Path(out)
    _check_out(out, overwrite)
    dataset = open_dataset(Path(data))
    items = len(dataset.catalogue.item_id)
    clock = [time.monotonic()]
    events = train_events(dataset)
    popularity = np.bincount(events.item, minlength=items)
    taken = item_vectors(dataset, events, vectors, seed)
    clock.append(time.monotonic())
    known = taken.known
    sizes = [codes] * levels if known.all() else [codes - 1] + [codes] * (levels - 1)
    quantized = _quantize(method, taken.values[known], sizes, seed)
    clock.append(time.monotonic())

    prefixes = np.empty((items, levels), np.int32)
    prefixes[known] = quantized.codes
    unknown = np.flatnonzero(~known)
    by_popularity = unknown[np.argsort(-popularity[unknown], kind="stable")]
    prefixes[by_popularity] = number_items(len(unknown), levels, codes)
    full = disambiguate(prefixes, popularity)
    book_sizes = [codes] * levels + [int(full[:, -1].max()) + 1] * (
        full.shape[1] - levels
    )
    neighbours = report.describe_neighbours(dataset, taken, prefixes, popularity, seed)
    clock.append(time.monotonic())
    result: dict[str, Any] = {
        "items": items,
        "method": method,
        "vectors": vectors,
        "seed": seed,
        "levels": full.shape[1],
        "quantized_levels": levels,
        "codes_per_level": book_sizes,
        "per_level": report.describe_codes(full, book_sizes),
        "collisions": report.describe_collisions(prefixes),
        "reconstruction": report.describe_reconstruction(
            quantized, taken.values[known]
        ),
        "never_seen": int((popularity == 0).sum()),
        "without_vector": len(unknown),
        "seconds": {
            stage: round(end - start, 2)
            for stage, start, end in zip(
                ("vectors", "quantize", "report"), clock[:-1], clock[1:], strict=True
            )
        },
        "neighbours": neighbours,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / REPORT, result)
    save_semantic_ids(SemanticIds(dataset.catalogue.item_id, full), out / SEMANTIC_IDS)
    return result


def number_items(count: int, levels: int, codes: int) -> np.ndarray:
    """Codes of items that only a number tells apart: `[count, levels] int32`.

    The first is the last code of its level, the others are digits to the base `codes`, which start again when they are
    used up.

    >>> number_items(3, 3, 2).tolist()
    [[1, 0, 0], [1, 0, 1], [1, 1, 0]]
    """
    digits = codes ** np.arange(levels - 1)[::-1]
    numbers = np.arange(count)[:, None] // digits % codes
    return np.concatenate([np.full((count, 1), codes - 1), numbers], axis=1).astype(
        np.int32
    )


def _quantize(
    method: Method, values: np.ndarray, sizes: list[int], seed: int
) -> Quantized:
    return (
        fit_rq_kmeans(values, sizes, seed)
        if method == "rq_kmeans"
        else fit_rq_vae(values, sizes, seed)
    )


def _check(method: str, vectors: str, levels: int, codes: int, seed: int) -> None:
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
            f"levels={levels} must be from 1 to 8; items that stay alike get one more level by themselves"
        )
    if not 2 <= codes <= 65536:
        raise InputError(f"codes={codes} must be from 2 to 65536; 256 is usual")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed} must be from 0 to 2^32 - 1")


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(
            f"out='{out}' is a file; give the folder to write {SEMANTIC_IDS} and {REPORT} to"
        )
    for name in (SEMANTIC_IDS, REPORT):
        if (out / name).exists() and not overwrite:
            raise InputError(
                f"out='{out}' holds {name}; give another folder, or replace it with --overwrite"
            )
