"""The plan of a study: its models, learning rates and seeds, and the runs they make.

A study file is Python, like a config file. Its `get_study()` returns a `Study`:

    def get_study() -> Study:
        return Study(
            base="synthetic",
            models={"tokenformer": {}, "transformer": {"model.gate": False}},
            reference="tokenformer",
            learning_rates=(1e-3, 4e-3),
            cpu_hours=0.3,
        )

The runs come in two rounds. The search trains every model at each of its learning rates
with the first seed. The final runs train each model at the rate with the best macro AUC
on the split valid with all seeds; the first of these exists already.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

from tokenrec.config import Config
from tokenrec.config.load import load_config, run_file, shipped_folder
from tokenrec.config.overrides import RUN_LENGTHS
from tokenrec.config.types import has_type, hint_name
from tokenrec.data.source import SPLITS
from tokenrec.errors import InputError, suggest
from tokenrec.study.bootstrap import LEAST_DRAWS

# The split on which learning rates are chosen.
TUNING_SPLIT = "valid"
_RATE = "optim.learning_rate"
# A model's name is the name of its folder too.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclasses.dataclass(frozen=True)
class Study:
    """Models that differ in a few config fields, and how they are trained and compared.

    Attributes:
      base: the config that all models start from, a path or a shipped name.
      models: name -> config fields that differ from the base, for example
        `{"bfts": {"model.gate": False}}`. A name is also the name of a folder.
      reference: the model that the others are compared with.
      learning_rates: rates of the dense weights that are tried for every model;
        `optim.table_learning_rate` is that of the base.
      cpu_hours: budget; no run begins once so many CPU-hours are spent.
      seeds: seeds of the final runs; the search uses the first.
      splits: splits that are scored; valid is among them.
      own_rates: learning rates of single models, instead of `learning_rates`, for
        example `{"din": (2.5e-3, 5e-3)}`.
      overrides: config fields that all models set.
      checkpoint: the checkpoint that is scored, "latest" or "best"; the best one is
        chosen on `train.eval_split`.
      draws: resamples of the users for each confidence interval.
      freeze_at: "split": the final runs and the baselines are also scored with
        histories and statistics of the past that end where a split begins
        (`tokenrec/evaluation/freeze.py`). Empty: they are not.
      ensembles: name -> models whose log-odds are averaged, first over all seeds of
        each model: one of a single model is the average of its seeds.
    """

    base: str
    models: dict[str, dict[str, Any]]
    reference: str
    learning_rates: tuple[float, ...]
    cpu_hours: float
    seeds: tuple[int, ...] = (0, 1, 2)
    splits: tuple[str, ...] = (TUNING_SPLIT, "test")
    own_rates: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: Literal["latest", "best"] = "latest"
    draws: int = 1_000
    freeze_at: Literal["", "split"] = ""
    ensembles: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def rates_of(self, model: str) -> tuple[float, ...]:
        """Learning rates that are tried for a model."""
        return self.own_rates.get(model, self.learning_rates)


class TrainingRun(NamedTuple):
    """One training run of a study."""

    model: str
    learning_rate: float
    seed: int

    @property
    def folder(self) -> Path:
        """Folder of the run, relative to the folder of the study."""
        return Path(
            "runs", self.model, f"lr-{self.learning_rate:g}", f"seed-{self.seed}"
        )


def load_study(path: Path) -> Study:
    """Read and check a study file.

    Args:
      path: a file, or the name of a study shipped in `configs/studies/`.

    Raises:
      InputError: there is no such file, it does not return a Study, or `check_study`
        refuses it.
    """
    shipped = {
        file.stem: file for file in sorted((shipped_folder() / "studies").glob("*.py"))
    }
    file = path if path.is_file() else shipped.get(path.stem)
    # An installed package has no folder `configs`; the path that the documentation
    # names must work there too.
    names = (file, Path(path.stem), Path("configs", "studies", path.name))
    if file is None or path not in names:
        raise InputError(
            f"--config={path} is neither a file nor a shipped study"
            f"{suggest(path.stem, shipped)}"
        )
    study = run_file(file, "study", "get_study", Study)
    check_study(study)
    return study


def check_study(study: Study) -> None:
    """Check the fields of a study and the configs of its models.

    Raises:
      InputError: lists all problems of the fields, or the first one of a config.
    """
    # Fields of a wrong type come first: the other checks would fail on them.
    problems = list(_type_problems(study)) or list(_problems(study))
    if problems:
        raise InputError("the study has problems:\n  " + "\n  ".join(problems))
    # Build every config of the search now: a misspelt field of the last model must not
    # surface after hours of training.
    for run in search_runs(study):
        try:
            config = run_config(study, run, None)
        except InputError as error:
            raise InputError(f"study, model '{run.model}': {error}") from error
        if config.data.objective != "ranking":
            raise InputError(
                f"study, model '{run.model}': data.objective='retrieval', but studies "
                "compare rankers; set data.objective='ranking'"
            )


def _type_problems(study: Study) -> Iterator[str]:
    for name, hint in get_type_hints(Study).items():
        value = getattr(study, name)
        if not has_type(value, hint):
            yield f"{name}={value!r} is not {hint_name(hint)}"


def _problems(study: Study) -> Iterator[str]:
    """List what is wrong with fields that have the right types."""
    for name in study.models:
        if not _NAME.fullmatch(name):
            yield (
                f"models: '{name}' is also the name of a folder; use letters, digits "
                "and . _ + -"
            )
    if study.reference not in study.models:
        yield (
            f"reference='{study.reference}' is none of the models"
            f"{suggest(study.reference, study.models)}"
        )
    for name in study.own_rates:
        if name not in study.models:
            yield (
                f"own_rates: '{name}' is none of the models"
                f"{suggest(name, study.models)}"
            )
    for name, members in study.ensembles.items():
        if name in study.models:
            yield f"ensembles: '{name}' is a model; give the average another name"
        unknown = [member for member in members if member not in study.models]
        if unknown or not members:
            yield (
                f"ensembles: '{name}' averages {members!r}; name one or more of the "
                f"models{suggest(unknown[0], study.models) if unknown else ''}"
            )
    # A repeated rate or seed would name one folder twice.
    lists: dict[str, tuple[Any, ...]] = {
        "learning_rates": study.learning_rates,
        "seeds": study.seeds,
        "splits": study.splits,
    }
    lists |= {f"own_rates['{name}']": rates for name, rates in study.own_rates.items()}
    for field, values in lists.items():
        if not values or len(set(values)) < len(values):
            yield f"{field}={values!r} is empty or has a value twice"
    if any(seed < 0 for seed in study.seeds):
        yield f"seeds={study.seeds!r} must not be negative"
    if set(study.splits) - set(SPLITS) or TUNING_SPLIT not in study.splits:
        yield (
            f"splits={study.splits!r} must be of {', '.join(SPLITS)}, and contain "
            f"{TUNING_SPLIT}, on which learning rates are chosen"
        )
    if study.cpu_hours <= 0:
        yield f"cpu_hours={study.cpu_hours} must be above 0"
    if study.draws < LEAST_DRAWS:
        yield f"draws={study.draws} is too few for an interval; use 1000"
    for name, fields in study.models.items():
        reserved = {_RATE, "seed"} & {*fields, *study.overrides}
        if reserved:
            yield (
                f"models: '{name}' sets {', '.join(sorted(reserved))}, which the study "
                "sets"
            )


def search_runs(study: Study) -> list[TrainingRun]:
    """Runs of the search: each model at each of its rates, with the first seed."""
    return [
        TrainingRun(name, rate, study.seeds[0])
        for name in study.models
        for rate in study.rates_of(name)
    ]


def final_runs(study: Study, chosen: Mapping[str, float]) -> list[TrainingRun]:
    """Final runs: every seed of each model at its rate in `chosen`."""
    return [
        TrainingRun(name, chosen[name], seed)
        for name in study.models
        if name in chosen
        for seed in study.seeds
    ]


def run_config(study: Study, run: TrainingRun, data: Path | None) -> Config:
    """Build the config of a training run.

    Args:
      study: the study that the run belongs to.
      run: model, learning rate and seed.
      data: folder of the data set; None for that of the base config.

    Raises:
      InputError: the fields of the model and the base do not make a valid config.
    """
    fields = {**study.models[run.model], _RATE: run.learning_rate, "seed": run.seed}
    return _config(study, fields, data)


def base_config(study: Study, data: Path | None) -> Config:
    """Build the config that all runs start from: the base with the overrides."""
    return _config(study, {}, data)


def _config(study: Study, fields: Mapping[str, Any], data: Path | None) -> Config:
    # Fields of a model replace the study's overrides of the same name, and its epochs
    # the study's steps.
    own_length = not fields.keys().isdisjoint(RUN_LENGTHS)
    shared = {
        name: value
        for name, value in study.overrides.items()
        if not (own_length and name in RUN_LENGTHS)
    }
    return load_config(
        study.base,
        [f"{name}={value}" for name, value in {**shared, **fields}.items()],
        "" if data is None else str(data),
    )
