"""Map the weights of one run to those of another, for a warm start.

The source is the run that has been trained, the target the run that starts from it.
Rows of tables match by value, dense weights by name and shape. Each function returns a
match, or the reason why there is none.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from tokenrec.checkpoint.run_weights import (
    EntryKeys,
    RunWeights,
    stack_of,
    table_keys,
)
from tokenrec.models.backbones.bfts import layer_windows


class MatchedRows(NamedTuple):
    """Rows of a table, or entries of a weight, that mean the same in two runs.

    Attributes:
      source: `[n] int64`, their indices in the source.
      target: `[n] int64`, their indices in the target.
      known: how many of them are not reserved rows.
    """

    source: np.ndarray
    target: np.ndarray
    known: int


def match_keys(source: EntryKeys, target: EntryKeys) -> MatchedRows | str:
    """Match entries by key.

    Args:
      source: keys in the source run.
      target: keys in the target run.

    Returns:
      The matched entries, or the reason why none can match.

    >>> match_keys(
    ...     EntryKeys.of("values", ["a", "c"], reserved=2),
    ...     EntryKeys.of("values", ["a", "b", "c"], reserved=2),
    ... ).target
    array([0, 1, 2, 4])
    """
    if source.kind != target.kind:
        return _difference(source.kind, target.kind)
    if source.values is None or target.values is None:
        if source.rows != target.rows:
            return _difference(f"{source.rows} rows", str(target.rows))
        # Every row is known: a number means the same in both runs.
        rows = np.arange(target.rows)
        return MatchedRows(rows, rows, len(rows))
    types = source.values.type, target.values.type
    # An empty vocabulary has no type of its own.
    if types[0] != types[1] and len(source.values) and len(target.values):
        return f"{source.kind} are " + _difference(*map(str, types))
    # For each value of the target its index among those of the source, -1 without one.
    indices = pc.fill_null(
        pc.index_in(target.values, value_set=source.values), -1
    ).to_numpy()
    known = np.flatnonzero(indices >= 0)
    reserved = np.arange(target.reserved)
    return MatchedRows(
        np.concatenate([reserved, source.reserved + indices[known]]),
        np.concatenate([reserved, target.reserved + known]),
        len(known),
    )


def match_table(name: str, source: RunWeights, target: RunWeights) -> MatchedRows | str:
    """Match the rows of a table of the target.

    Args:
      name: name of the table.
      source: the run that has been trained.
      target: the run that starts from it.

    Returns:
      The matched rows, or the reason why there are none.

    Raises:
      InputError: a vocabulary is missing, or is not that of the table.
    """
    if name not in source.model.embedder.tables:
        return "not in the source run"
    widths = [stack_of(run.model, name).width for run in (source, target)]
    # Rows of another width are other vectors, whatever they stand for.
    if widths[0] != widths[1]:
        return _difference(f"width {widths[0]}", str(widths[1]))
    return match_keys(table_keys(name, source), table_keys(name, target))


def match_weight(
    name: str, source: RunWeights, target: RunWeights
) -> MatchedRows | str | None:
    """Match a dense weight of the target.

    Args:
      name: name of the weight in `RunWeights.places`.
      source: the run that has been trained.
      target: the run that starts from it.

    Returns:
      None if the weight matches as a whole; its matched entries, along the axis of its
      keys; or the reason why it does not match.
    """
    if name not in source.places:
        return "not in the source run"
    # 1. Weights of a maker match only if it reads the same features.
    for prefix, inputs in target.makers.items():
        if name.startswith(prefix + "/") and source.makers.get(prefix) != inputs:
            return _input_difference(source.makers.get(prefix, ()), inputs)
    # 2. Weights whose entries have keys match entry by entry.
    shapes = source.shape(name), target.shape(name)
    if name in target.keys and name in source.keys:
        # All other axes must have equal lengths.
        axis = target.keys[name].axis
        if np.delete(shapes[0], axis).tolist() == np.delete(shapes[1], axis).tolist():
            matched = match_keys(source.keys[name], target.keys[name])
            if isinstance(matched, MatchedRows) and not matched.known:
                return f"none of its {target.keys[name].kind} is in the source run"
            return matched
    # 3. All others match as a whole.
    if shapes[0] == shapes[1]:
        return None
    return _difference(f"shape {shapes[0]}", str(shapes[1]))


def window_difference(name: str, source: RunWeights, target: RunWeights) -> str:
    """Describe the windows of a weight's layer if they differ; empty otherwise.

    Such a weight is carried all the same: its shape does not depend on the window.
    """
    parts = name.split("/")
    if parts[:2] != ["backbone", "layers"]:
        return ""
    windows = [
        layer_windows(run.model.config.model)[int(parts[2])] for run in (source, target)
    ]
    if windows[0] == windows[1]:
        return ""
    texts = [
        "full attention" if window is None else f"window {window}" for window in windows
    ]
    return _difference(*texts)


def _difference(source: str, target: str) -> str:
    return f"{source} in the source run, {target} in this run"


def _input_difference(source: tuple[str, ...], target: tuple[str, ...]) -> str:
    only_source = ", ".join(name for name in source if name not in target)
    only_target = ", ".join(name for name in target if name not in source)
    if not only_source and not only_target:
        return "reads the same features in another order"
    texts = []
    if only_source:
        texts.append(f"only in the source run {only_source}")
    if only_target:
        texts.append(f"only in this run {only_target}")
    return "reads other features: " + "; ".join(texts)
