"""Read and check the folder of a study: `study.json`, its tables, its command lines."""

from __future__ import annotations

import dataclasses
import math
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from tokenrec.analysis.study_rows import (
    AttentionShare,
    CurvePoint,
    Difference,
    EffectiveRank,
    LabelInformation,
    MapCell,
    ReliabilityBin,
    Result,
    SingularValue,
    columns_of,
)
from tokenrec.config.types import has_type, hint_name
from tokenrec.data.sources.tabular import read_table
from tokenrec.errors import InputError, suggest
from tokenrec.runtime.files import read_json

_REMEDY = "name the --out folder of `tokenrec study`"


@dataclasses.dataclass(frozen=True)
class StudyInfo:
    """The content of `study.json`.

    Attributes:
      study: name of the study.
      command: the command line that ran it.
      reference: the model that the others are compared with.
      arms: model -> config fields that differ from the base.
      learning_rates: all rates of the search.
      seeds: seeds of the final runs.
      cpu_hours: budget.
      spent_cpu_hours: CPU-hours used.
      base: the config that all models start from.
      versions: package -> version.
      data: "rows" of each split, and "positives" by split and task.
      diverged: folders of runs with non-finite steps; older studies do not record them.
      ensembles: name -> models whose scores it averages; older studies have none.
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
    ensembles: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def positives(self, split: str, task: str) -> int | None:
        """Positive labels of a task in a split; None if they are not recorded."""
        return self.data.get("positives", {}).get(split, {}).get(task)


class _HasModel(Protocol):
    @property
    def model(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class StudyFiles:
    """All tables of a study; an optional table that does not exist is None.

    Attributes:
      info: `study.json`.
      results: metrics of every run and baseline.
      differences: differences to the reference.
      reliability: calibration of the final runs, bin by bin.
      curves: logged values of the runs.
      flops: model -> FLOPs of a forward pass per example.
      ranks: effective ranks of event states.
      spectra: singular values of event states.
      information: information of event states on the label.
      attention: attention mass on parts of the stream.
      maps: attention maps in blocks.
      states_command: the command line that made the last five.
    """

    info: StudyInfo
    results: Sequence[Result]
    differences: Sequence[Difference] | None
    reliability: Sequence[ReliabilityBin] | None
    curves: Sequence[CurvePoint] | None
    flops: Mapping[str, float] | None
    ranks: Sequence[EffectiveRank] | None
    spectra: Sequence[SingularValue] | None
    information: Sequence[LabelInformation] | None
    attention: Sequence[AttentionShare] | None
    maps: Sequence[MapCell] | None
    states_command: str | None


def read_study(folder: Path) -> StudyFiles:
    """Read the folder of a study.

    Raises:
      InputError: it is not the folder of a study, a file cannot be read, lacks a column
        or a field, holds a wrong value or no rows, has a result twice, or belongs to
        another study.
    """
    if not (folder / "study.json").is_file():
        raise InputError(f"--study={folder} holds no study.json; {_REMEDY}")
    info = _read_info(folder / "study.json")
    path = folder / "results.parquet"
    results = _read_rows(path, Result, info.study)
    _refuse_duplicates(path, results)
    trained = {row.model for row in results if row.learning_rate is not None}
    if info.reference not in trained:
        raise InputError(
            f"{path}: has no run of the reference '{info.reference}'; let the study end"
        )
    # Tables of another study, or of a model that was renamed, must not be drawn.
    models = {row.model for row in results}

    def optional[Row: _HasModel](name: str, kind: type[Row]) -> list[Row] | None:
        path = folder / name
        if not path.is_file():
            return None
        rows = _read_rows(path, kind, info.study)
        for row in rows:
            if row.model not in models:
                raise InputError(
                    f"{path}: has rows of model '{row.model}', and results.parquet has "
                    f"none{suggest(row.model, models)}"
                )
        return rows

    return StudyFiles(
        info,
        results,
        optional("differences.parquet", Difference),
        optional("reliability.parquet", ReliabilityBin),
        optional("curves.parquet", CurvePoint),
        _read_flops(folder / "flops.json"),
        optional("ranks.parquet", EffectiveRank),
        optional("spectra.parquet", SingularValue),
        optional("information.parquet", LabelInformation),
        optional("attention.parquet", AttentionShare),
        optional("maps.parquet", MapCell),
        _read_states_command(folder / "states.json"),
    )


def _read_info(path: Path) -> StudyInfo:
    fields = read_json(path, "study", _REMEDY)
    hints = get_type_hints(StudyInfo)
    if not isinstance(fields, dict):
        raise InputError(f"{path}: is not a JSON object; {_REMEDY}")
    # Studies from before the fields existed lack them.
    fields = {"diverged": [], "ensembles": {}, **fields}
    for name, hint in hints.items():
        if name not in fields:
            raise InputError(f"{path}: has no field '{name}'{suggest(name, fields)}")
        if not has_type(fields[name], hint):
            raise InputError(
                f"{path}: {name}={fields[name]!r} is not {hint_name(hint)}; {_REMEDY}"
            )
    positives = fields["data"].get("positives", {})
    if not has_type(positives, dict[str, dict[str, int]]):
        raise InputError(
            f"{path}: data.positives={positives!r} is not {{split: {{task: count}}}}; "
            f"{_REMEDY}"
        )
    return StudyInfo(**{name: fields[name] for name in hints})


def _read_states_command(path: Path) -> str | None:
    """Read the command line that measured the states of the models."""
    if not path.is_file():
        return None
    remedy = "make it anew with benchmarks.study_states"
    fields = read_json(path, "states", remedy)
    if not has_type(fields, dict[str, str]) or "command" not in fields:
        raise InputError(f"{path}: is not {{command: words}}; {remedy}")
    return str(fields["command"])


def _read_flops(path: Path) -> dict[str, float] | None:
    if not path.is_file():
        return None
    flops = read_json(path, "FLOPs", "write {model: FLOPs of an example}")
    if not has_type(flops, dict[str, float]) or min(flops.values(), default=1) <= 0:
        raise InputError(
            f"{path}: is not {{model: FLOPs of an example}} with numbers above 0; "
            "correct it or remove it"
        )
    return flops


def _read_rows[Row](path: Path, kind: type[Row], study: str) -> list[Row]:
    """Read the rows of a table.

    Args:
      path: a Parquet file.
      kind: data class whose fields are the columns.
      study: name of the study that the rows must have.

    Raises:
      InputError: the file does not fit.
    """
    table = read_table(path, _columns_in(path, kind))
    hints = {
        name: hint
        for name, hint in get_type_hints(kind).items()
        if name in table.column_names
    }
    # A study of one model has no differences; every other table has rows.
    if not table.num_rows and kind is not Difference:
        raise InputError(
            f"{path}: has no rows; let the study end, or remove the file if it is "
            "optional"
        )
    columns = []
    for name, hint in hints.items():
        # An undefined metric is null or NaN, depending on the writer.
        values = [
            None if isinstance(value, float) and math.isnan(value) else value
            for value in table[name].to_pylist()
        ]
        if None in values and types.NoneType not in get_args(hint):
            raise InputError(
                f"{path}, row {values.index(None) + 1}: column '{name}' has no value; "
                "make the file anew"
            )
        columns.append(values)
    # The first field of every data class is the name of the study.
    other = next((value for value in columns[0] if value != study), None)
    if other is not None:
        raise InputError(
            f"{path}: has rows of study '{other}', study.json is of '{study}'; keep "
            "studies apart"
        )
    return [
        kind(**dict(zip(hints, row, strict=True))) for row in zip(*columns, strict=True)
    ]


def _columns_in(path: Path, kind: type) -> dict[str, pa.DataType]:
    """Columns to read for rows of the data class `kind`.

    A field with a default came later: files of older studies lack its column.
    """
    later = {
        field.name
        # A data class, as its caller says.
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    }
    try:
        present = set(pq.read_schema(path).names)
    except (OSError, pa.ArrowException):
        # `read_table` says what is wrong with the file.
        present = later
    return {
        name: arrow_type
        for name, arrow_type in columns_of(kind).items()
        if name in present or name not in later
    }


def _refuse_duplicates(path: Path, rows: Sequence[Result]) -> None:
    counts = Counter(
        (row.model, row.seed, row.learning_rate, row.split, row.task, row.metric)
        for row in rows
    )
    key, times = counts.most_common(1)[0]
    if times > 1:
        model, seed, rate, split, task, metric = key
        raise InputError(
            f"{path}: {metric} of {model}, {task}, {split}, seed {seed}, learning rate "
            f"{rate} occurs {times} times; write each result once"
        )
