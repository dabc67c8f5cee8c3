"""What a study runs: models that differ in a few config fields, learning rates for each, seeds for the best."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

from tokenrec.config import Config
from tokenrec.config.load import load_config, run_file, shipped_folder
from tokenrec.config.types import has_type, hint_name
from tokenrec.data.source import SPLITS
from tokenrec.errors import InputError, suggest

CHOSEN_BY = "valid"
_RATE = "optim.learning_rate"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclasses.dataclass(frozen=True)
class Study:
    """A study file's `get_study()` returns one.

    Every model is trained with the first seed at every learning rate; the rate of the best macro AUC on valid is
    trained with the other seeds too, and scored on all `splits`.

    Attributes:
      base: a config, by path or shipped name.
      models: config fields of each model that differ from the base: `{"bfts only": ...}` would not be a folder's name,
        `{"bfts": {"model.gate": False}}` is.
      reference: the model that the others are compared with.
      learning_rates: of the dense weights; `optim.table_learning_rate` is the base's.
      own_rates: of models that are tried at others, `{"din": (2.5e-3, 5e-3)}`.
      overrides: config fields of all models.
      checkpoint: latest, or best, which is then chosen on `train.eval_split`.
      cpu_hours: no run begins once so many are spent.
      draws: resamples of the users for each interval.
    """

    base: str
    models: dict[str, dict[str, Any]]
    reference: str
    learning_rates: tuple[float, ...]
    cpu_hours: float
    seeds: tuple[int, ...] = (0, 1, 2)
    splits: tuple[str, ...] = (CHOSEN_BY, "test")
    own_rates: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: Literal["latest", "best"] = "latest"
    draws: int = 1_000

    def rates_of(self, model: str) -> tuple[float, ...]:
        """Learning rates that a model is tried at."""
        return self.own_rates.get(model, self.learning_rates)


class TrainingRun(NamedTuple):
    """One run of a study."""

    model: str
    learning_rate: float
    seed: int

    @property
    def folder(self) -> Path:
        """Below the study's folder."""
        return Path(
            "runs", self.model, f"lr-{self.learning_rate:g}", f"seed-{self.seed}"
        )


def load_study(path: Path) -> Study:
    """The study of a file, or of one shipped in `configs/studies/`; like a config file, it is run.

    Raises:
      InputError: no such file, it does not return a Study, or `check_study` refuses it.
    """
    shipped = {
        file.stem: file for file in sorted((shipped_folder() / "studies").glob("*.py"))
    }
    file = path if path.is_file() else shipped.get(path.stem)
    if file is None or path not in (
        file,
        Path(path.stem),
        Path("configs", "studies", path.name),
    ):
        raise InputError(
            f"--config={path} is neither a file nor a shipped study{suggest(path.stem, shipped)}"
        )
    study = run_file(file, "study", "get_study", Study)
    check_study(study)
    return study


def check_study(study: Study) -> None:
    """Raises an InputError that lists what is wrong with a study, the configs of its models included."""
    hints = get_type_hints(Study)
    wrong_types = [
        f"{name}={getattr(study, name)!r} is not {hint_name(hint)}"
        for name, hint in hints.items()
        if not has_type(getattr(study, name), hint)
    ]
    if wrong_types:
        raise InputError("the study has problems:\n  " + "\n  ".join(wrong_types))
    problems = [
        f"models: '{name}' names folders too; use letters, digits and . _ + -"
        for name in study.models
        if not _NAME.fullmatch(name)
    ]
    if study.reference not in study.models:
        problems.append(
            f"reference='{study.reference}' is none of its models{suggest(study.reference, study.models)}"
        )
    problems += [
        f"own_rates: '{name}' is none of its models{suggest(name, study.models)}"
        for name in study.own_rates
        if name not in study.models
    ]
    lists = {
        field: getattr(study, field) for field in ("learning_rates", "seeds", "splits")
    }
    lists |= {f"own_rates['{name}']": rates for name, rates in study.own_rates.items()}
    for field, values in lists.items():
        if not values or len(set(values)) < len(values):
            problems.append(f"{field}={values!r} is empty or says a value twice")
    if any(seed < 0 for seed in study.seeds):
        problems.append(f"seeds={study.seeds!r} must not be negative")
    wrong = set(study.splits) - set(SPLITS)
    if wrong or CHOSEN_BY not in study.splits:
        problems.append(
            f"splits={study.splits!r} must be of {', '.join(SPLITS)}, with {CHOSEN_BY}, which chooses"
        )
    if study.cpu_hours <= 0:
        problems.append(f"cpu_hours={study.cpu_hours} must be above 0")
    if study.draws < 100:
        problems.append(f"draws={study.draws} is too few for an interval; use 1000")
    for name, fields in study.models.items():
        own = {_RATE, "seed"} & {*fields, *study.overrides}
        if own:
            problems.append(
                f"models: '{name}' sets {', '.join(sorted(own))}, which the study sets"
            )
    if problems:
        raise InputError("the study has problems:\n  " + "\n  ".join(problems))
    for job in first_jobs(study):
        try:
            config = job_config(study, job, None)
        except InputError as error:
            raise InputError(f"study, model '{job.model}': {error}") from error
        if config.data.objective != "ranking":
            raise InputError(
                f"study, model '{job.model}': data.objective is retrieval; studies compare rankers"
            )


def first_jobs(study: Study) -> list[TrainingRun]:
    """Of the search: every model and learning rate, with the first seed."""
    return [
        TrainingRun(name, rate, study.seeds[0])
        for name in study.models
        for rate in study.rates_of(name)
    ]


def final_jobs(study: Study, chosen: Mapping[str, float]) -> list[TrainingRun]:
    """Every seed of each model at its chosen learning rate."""
    return [
        TrainingRun(name, chosen[name], seed)
        for name in study.models
        if name in chosen
        for seed in study.seeds
    ]


def job_config(study: Study, job: TrainingRun, data: Path | None) -> Config:
    """The checked config of a run, which reads `data` if given."""
    return _config(
        study,
        {**study.models[job.model], _RATE: job.learning_rate, "seed": job.seed},
        data,
    )


def base_config(study: Study, data: Path | None) -> Config:
    """What the configs of all runs start from."""
    return _config(study, {}, data)


def _config(study: Study, fields: Mapping[str, Any], data: Path | None) -> Config:
    config = load_config(
        study.base,
        [f"{name}={value}" for name, value in {**study.overrides, **fields}.items()],
    )
    if data is not None:
        config.data.path = str(data)
    return config
