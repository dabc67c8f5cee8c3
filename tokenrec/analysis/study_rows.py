"""Rows of the tables of a study: a data class for each table, its fields the columns.

`tokenrec study` writes `Result`, `Difference`, `ReliabilityBin` and `CurvePoint`; the
other tables come from `benchmarks/study_states.py`. docs/guides/studies.md lists the files.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, get_type_hints

import pyarrow as pa

# The task of a mean over tasks.
MACRO = "macro"
# The layer of the tokens, which enter the first block.
TOKENS = -1

_ARROW_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64()}


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """A metric of one run; of a baseline or an ensemble, without rate, with seed -1.

    `frozen_auc` and `frozen_gauc` are those of frozen histories and statistics.
    """

    study: str
    model: str
    seed: int
    learning_rate: float | None
    split: str
    task: str
    metric: str
    value: float | None
    examples_per_second: float | None
    parameters: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """Model minus reference, mean over seeds, with its bootstrap interval.

    `undefined_draws` counts the resamples in which the metric is undefined; interval
    and p-value are without them. Older studies do not record it.
    """

    study: str
    model: str
    reference: str
    split: str
    task: str
    metric: str
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    users: int
    positives: int
    undefined_draws: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Log rows of one run with neighbouring probabilities (`metrics.calibration`).

    `predicted` is their mean probability, `observed` their share of positive labels.
    Bins count from 0, in ascending order of the probability.
    """

    study: str
    model: str
    seed: int
    split: str
    task: str
    bin: int
    predicted: float
    observed: float
    examples: int


@dataclasses.dataclass(frozen=True, slots=True)
class CurvePoint:
    """A logged value at one step of a run."""

    study: str
    model: str
    seed: int
    learning_rate: float
    step: int
    name: str
    value: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class EffectiveRank:
    """Effective rank of the event states after a layer, or of the tokens (TOKENS)."""

    study: str
    model: str
    seed: int
    step: int
    layer: int
    effective_rank: float


@dataclasses.dataclass(frozen=True, slots=True)
class SingularValue:
    """A singular value of the centred event states; index 0 is the largest."""

    study: str
    model: str
    seed: int
    layer: int
    index: int
    singular_value: float


@dataclasses.dataclass(frozen=True, slots=True)
class LabelInformation:
    """Information of the cluster of an event state on a task, bias-corrected."""

    study: str
    model: str
    seed: int
    layer: int
    task: str
    clusters: int
    nats: float


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionShare:
    """Share of the attention of a head that goes to a part of the stream."""

    study: str
    model: str
    layer: int
    head: int
    source: str
    value: float


@dataclasses.dataclass(frozen=True, slots=True)
class MapCell:
    """Share of attention that a query of one block gives to all keys of another block.

    The positions of a stream are cut into blocks, each named by its first position; all
    layers of a model have the same blocks. The value is the mean over heads, streams
    and the block's valid queries.
    """

    study: str
    model: str
    layer: int
    query: int
    key: int
    value: float


def columns_of(kind: type) -> dict[str, pa.DataType]:
    """Columns of the table whose rows are of the data class `kind`, in order."""
    return {name: _arrow_type(hint) for name, hint in get_type_hints(kind).items()}


def _arrow_type(hint: Any) -> pa.DataType:
    """Arrow type of `float` or `float | None`; every Arrow column may hold nulls."""
    (plain,) = set(typing.get_args(hint) or (hint,)) - {types.NoneType}
    return _ARROW_TYPES[plain]
