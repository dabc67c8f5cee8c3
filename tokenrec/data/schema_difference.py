"""Say in what two schemas differ, for a run that meets another data set than its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tokenrec.data.schema import Feature, Schema

_NORMALISATION = ("mean", "deviation")


def schema_differences(
    trained: Schema, other: Schema, *, compare_items: bool
) -> Iterator[str]:
    """Yield each difference that changes what a trained model reads, in a phrase.

    Args:
      trained: schema of the data set that the run was trained on.
      other: schema of the data set at hand.
      compare_items: whether the catalogues must have the same items. A model that only
        reads features of items does not depend on their number and order.
    """
    yield from _feature_differences(trained, other)
    if trained.tasks != other.tasks:
        names = [[task.name for task in schema.tasks] for schema in (trained, other)]
        weights = [
            [dataclasses.replace(task, weight=1.0) for task in schema.tasks]
            for schema in (trained, other)
        ]
        what = "weights of the tasks"
        if weights[0] != weights[1]:
            what = "kinds, classes or normalisation of the tasks"
        if names[0] != names[1]:
            what = "tasks"
        yield f"{what}: {trained.tasks} -> {other.tasks}"
    if trained.weighted != other.weighted:
        yield f"weights of the rows: {trained.weighted} -> {other.weighted}"
    for table in sorted(trained.tables.keys() | other.tables.keys()):
        rows = (trained.tables.get(table), other.tables.get(table))
        if rows[0] != rows[1]:
            yield f"vocabulary size of table '{table}': {rows[0]} -> {rows[1]}"
    if trained.levels != other.levels:
        yield f"levels of the semantic ids: {trained.levels} -> {other.levels}"
    elif trained.codes_digest != other.codes_digest:
        yield "codes of the semantic ids"
    yield from _id_differences(trained, other, compare_items)


def _feature_differences(trained: Schema, other: Schema) -> Iterator[str]:
    before = {feature.name: feature for feature in trained.features}
    now = {feature.name: feature for feature in other.features}
    for name in before.keys() - now.keys():
        yield f"feature '{name}' is missing"
    for name in now.keys() - before.keys():
        yield f"feature '{name}' is new"
    for name, feature in before.items():
        if name in now:
            yield from _changes(feature, now[name])
    if before.keys() == now.keys() and list(before) != list(now):
        yield f"order of the features: {', '.join(before)} -> {', '.join(now)}"


def _changes(before: Feature, now: Feature) -> Iterator[str]:
    for field in dataclasses.fields(Feature):
        values = (getattr(before, field.name), getattr(now, field.name))
        if values[0] != values[1]:
            of = " (normalisation)" if field.name in _NORMALISATION else ""
            yield (
                f"{field.name}{of} of feature '{before.name}': {values[0]!r} -> "
                f"{values[1]!r}"
            )


def _id_differences(
    trained: Schema, other: Schema, compare_items: bool
) -> Iterator[str]:
    """Yield differences in the meaning of ids, of which the sizes tell nothing."""
    vocabularies = (trained.vocabularies_digest, other.vocabularies_digest)
    both_known = all(vocabularies)
    if both_known and vocabularies[0] != vocabularies[1]:
        yield "values of the vocabularies, or the tokenizer"
    if compare_items and trained.items != other.items:
        yield f"items of the catalogue: {trained.items} -> {other.items}"
    elif all((trained.ids_digest, other.ids_digest)) and (
        trained.ids_digest != other.ids_digest
    ):
        if not both_known:
            yield "values of the vocabularies, the tokenizer, or the items"
        elif compare_items and vocabularies[0] == vocabularies[1]:
            yield "items of the catalogue, which are as many but others"
