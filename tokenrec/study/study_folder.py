"""The runs of a study in its folder: requests, scores, chosen rates, model sizes."""

from __future__ import annotations

from pathlib import Path

from tokenrec.runtime.files import read_json
from tokenrec.study.jobs import (
    DESCRIPTION_FILE,
    FROZEN_SUFFIX,
    RunRequest,
    is_done,
)
from tokenrec.study.plan import (
    TUNING_SPLIT,
    Study,
    TrainingRun,
    base_config,
    final_runs,
    run_config,
    search_runs,
)
from tokenrec.study.results import ScoredSplit, best_rates, read_scores


class StudyFolder:
    """The runs of a study in its folder.

    Args:
      study: the plan.
      out: folder of the study.
      data: folder of the data set; None for that of the base config.
    """

    def __init__(self, study: Study, out: Path, data: Path | None) -> None:
        self.study = study
        self.out = out
        self.data = data
        self.base = base_config(study, data)

    def request(
        self, run: TrainingRun, splits: tuple[str, ...], *, frozen: bool = False
    ) -> RunRequest:
        """Request a run and its scores on `splits`, frozen ones too if asked."""
        # Every request has a config of its own: configs are mutable.
        config = run_config(self.study, run, self.data)
        return RunRequest(
            self.out / run.folder,
            config,
            splits,
            self.study.checkpoint,
            freeze_at=self.study.freeze_at if frozen else "",
        )

    def search_request(self, run: TrainingRun) -> RunRequest:
        """Request a run of the search; the first of a model describes the model too."""
        first_rate = self.study.rates_of(run.model)[0]
        return self.request(run, (TUNING_SPLIT,))._replace(
            described=run.learning_rate == first_rate
        )

    def model_sizes(self) -> dict[str, tuple[int, float]]:
        """Parameters, and FLOPs of a forward pass per example, of described models."""
        # Only the first run of the search of a model describes it.
        sizes = {}
        for run in search_runs(self.study):
            path = self.out / run.folder / DESCRIPTION_FILE
            if path.is_file():
                description = read_json(
                    path, "figures", "remove it, and start the study again"
                )
                parameters = description["parameters"]
                sizes[run.model] = (
                    parameters["dense"] + parameters["tables"],
                    description["flops_per_example"],
                )
        return sizes

    def scores(
        self, run: TrainingRun, split: str, *, frozen: bool = False
    ) -> ScoredSplit | None:
        """Read the scores of a run, live or frozen; None if it is not done."""
        # The file of scores alone does not suffice: training must be complete too.
        if not is_done(self.request(run, (split,), frozen=frozen)):
            return None
        suffix = FROZEN_SUFFIX if frozen else ""
        return read_scores(self.out / run.folder / f"{split}{suffix}.parquet")

    def chosen_rates(self) -> dict[str, float]:
        """Choose the rate of each model by macro AUC on valid, of finished runs."""
        values = {}
        for run in search_runs(self.study):
            scored = self.scores(run, TUNING_SPLIT)
            if scored is not None:
                values[run.model, run.learning_rate] = scored.metrics()["macro_auc"]
        return best_rates(values)

    def final_runs(self) -> list[TrainingRun]:
        """Final runs at the rates that are chosen so far."""
        return final_runs(self.study, self.chosen_rates())
