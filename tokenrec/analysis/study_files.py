"""What `tokenrec study` leaves in its folder, read and checked."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, get_args, get_type_hints

import pyarrow as pa

from tokenrec.config.types import has_type, hint_name
from tokenrec.data.sources.tabular import read_table
from tokenrec.errors import InputError, suggest
from tokenrec.runtime.files import read_json

MACRO = "macro"  # the task of a mean over tasks
TOKENS = -1  # the layer of what enters the first block

_REMEDY = "name the --out folder of `tokenrec study`"
_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64()}


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """A metric of one run, or of a rate baseline, which has no learning rate and seed -1."""

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
    """Model minus reference, mean over seeds, with the interval of a paired bootstrap over users."""

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


@dataclasses.dataclass(frozen=True, slots=True)
class CurvePoint:
    """A logged value of a step of one run."""

    study: str
    model: str
    seed: int
    learning_rate: float
    step: int
    name: str
    value: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Rank:
    """Effective rank of the event states after a layer, or of the tokens that enter the first (TOKENS)."""

    study: str
    model: str
    seed: int
    step: int
    layer: int
    effective_rank: float


@dataclasses.dataclass(frozen=True, slots=True)
class SingularValue:
    """Of the centred event states after a layer; index 0 is the largest."""

    study: str
    model: str
    seed: int
    layer: int
    index: int
    singular_value: float


@dataclasses.dataclass(frozen=True, slots=True)
class Information:
    """Nats that the k-means cluster of an event state tells about a task, less those of shuffled labels."""

    study: str
    model: str
    seed: int
    layer: int
    task: str
    clusters: int
    nats: float


@dataclasses.dataclass(frozen=True, slots=True)
class Mass:
    """Share of a head's attention that goes to a part of the stream."""

    study: str
    model: str
    layer: int
    head: int
    source: str
    value: float


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """Of an attention map: what a row of a block of queries gives to a block of keys, mean over heads, streams and
    the block's real rows. A block is named by its first row in the stream; those of one model are the same in all
    layers.
    """

    study: str
    model: str
    layer: int
    query: int
    key: int
    value: float


@dataclasses.dataclass(frozen=True)
class About:
    """`study.json`. `arms` are the fields that a model sets, `data` the rows, and positives by split and task;
    `diverged` names runs whose steps were not finite, which older studies do not say.
    """

    study: str
    command: str
    reference: str
    arms: dict[str, dict[str, Any]]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    cpu_hours: float
    spent_cpu_hours: float
    base: dict[str, Any]
    versions: dict[str, Any]
    data: dict[str, Any]
    diverged: tuple[str, ...] = ()

    def positives(self, split: str, task: str) -> int | None:
        """Of a task in a split; None if not recorded."""
        return self.data.get("positives", {}).get(split, {}).get(task)


class _OfModel(Protocol):
    @property
    def model(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class StudyFiles:
    """All tables of a study; an optional file that is not there is None."""

    about: About
    results: Sequence[Result]
    differences: Sequence[Difference] | None
    curves: Sequence[CurvePoint] | None
    flops: Mapping[str, float] | None
    ranks: Sequence[Rank] | None
    spectra: Sequence[SingularValue] | None
    information: Sequence[Information] | None
    attention: Sequence[Mass] | None
    maps: Sequence[Cell] | None
    states_command: str | None


def read_study(folder: Path) -> StudyFiles:
    """Reads the folder of a study.

    Raises:
      InputError: it is not one, a file cannot be read, lacks a column or a field, holds a wrong value or no rows, says
        a result twice, or is of another study.
    """
    if not (folder / "study.json").is_file():
        raise InputError(f"--study={folder} holds no study.json; {_REMEDY}")
    about = _read_about(folder / "study.json")
    results = _read(folder / "results.parquet", Result, about.study)
    _refuse_repeats(folder / "results.parquet", results)
    if about.reference not in {
        row.model for row in results if row.learning_rate is not None
    }:
        raise InputError(
            f"{folder / 'results.parquet'}: has no run of the reference '{about.reference}'; let the study end"
        )
    known = {row.model for row in results}

    def optional[Row: _OfModel](name: str, kind: type[Row]) -> list[Row] | None:
        path = folder / name
        rows = _read(path, kind, about.study) if path.is_file() else None
        for row in rows or ():
            if row.model not in known:
                near = suggest(row.model, known)
                raise InputError(
                    f"{path}: has rows of model '{row.model}', and results.parquet has none{near}"
                )
        return rows

    return StudyFiles(
        about,
        results,
        optional("differences.parquet", Difference),
        optional("curves.parquet", CurvePoint),
        _read_flops(folder / "flops.json"),
        optional("ranks.parquet", Rank),
        optional("spectra.parquet", SingularValue),
        optional("information.parquet", Information),
        optional("attention.parquet", Mass),
        optional("maps.parquet", Cell),
        _read_states_command(folder / "states.json"),
    )


def _read_about(path: Path) -> About:
    found = read_json(path, "study", _REMEDY)
    hints = get_type_hints(About)
    if not isinstance(found, dict):
        raise InputError(f"{path}: is not a JSON object; {_REMEDY}")
    found = {"diverged": [], **found}
    for name, hint in hints.items():
        if name not in found:
            raise InputError(f"{path}: has no field '{name}'{suggest(name, found)}")
        if not has_type(found[name], hint):
            raise InputError(
                f"{path}: {name}={found[name]!r} is not {hint_name(hint)}; {_REMEDY}"
            )
    positives = found["data"].get("positives", {})
    if not has_type(positives, dict[str, dict[str, int]]):
        raise InputError(
            f"{path}: data.positives={positives!r} is not {{split: {{task: count}}}}; {_REMEDY}"
        )
    return About(**{name: found[name] for name in hints})


def _read_states_command(path: Path) -> str | None:
    """What made the tables of the insides of the models."""
    if not path.is_file():
        return None
    found = read_json(path, "states", "make it anew with benchmarks.study_states")
    if not has_type(found, dict[str, str]) or "command" not in found:
        raise InputError(
            f"{path}: is not {{command: words}}; make it anew with benchmarks.study_states"
        )
    return str(found["command"])


def _read_flops(path: Path) -> dict[str, float] | None:
    if not path.is_file():
        return None
    found = read_json(path, "FLOPs", "write {model: FLOPs of an example}")
    if not has_type(found, dict[str, float]) or min(found.values(), default=1) <= 0:
        raise InputError(
            f"{path}: is not {{model: FLOPs of an example}} with numbers above 0; correct it or remove it"
        )
    return found


def _read[Row](path: Path, kind: type[Row], study: str) -> list[Row]:
    """Rows of a table whose columns are the fields of a data class; NaN, which JSON and Arrow tell apart, is None."""
    hints = get_type_hints(kind)
    table = read_table(path, columns_of(kind))
    if not table.num_rows and kind is not Difference:  # a study of one model has none
        raise InputError(
            f"{path}: has no rows; let the study end, or remove the file if it is optional"
        )
    columns = []
    for name, hint in hints.items():
        values = [
            None if isinstance(v, float) and math.isnan(v) else v
            for v in table[name].to_pylist()
        ]
        if None in values and types.NoneType not in get_args(hint):
            raise InputError(
                f"{path}, row {values.index(None) + 1}: column '{name}' has no value; make the file anew"
            )
        columns.append(values)
    other = next((value for value in columns[0] if value != study), None)
    if other is not None:
        raise InputError(
            f"{path}: has rows of study '{other}', study.json is of '{study}'; keep studies apart"
        )
    return [kind(*row) for row in zip(*columns, strict=True)]


def columns_of(kind: type) -> dict[str, pa.DataType]:
    """Columns of a table whose rows are of a data class, in order."""
    return {name: _arrow_type(hint) for name, hint in get_type_hints(kind).items()}


def _arrow_type(hint: Any) -> pa.DataType:
    (plain,) = set(typing.get_args(hint) or (hint,)) - {types.NoneType}
    return _ARROW[plain]


def _refuse_repeats(path: Path, rows: Sequence[Result]) -> None:
    counts = Counter(
        (row.model, row.seed, row.learning_rate, row.split, row.task, row.metric)
        for row in rows
    )
    key, times = counts.most_common(1)[0]
    if times > 1:
        model, seed, rate, split, task, metric = key
        raise InputError(
            f"{path}: {metric} of {model}, {task}, {split}, seed {seed}, learning rate {rate} stands there "
            f"{times} times; write each result once"
        )
