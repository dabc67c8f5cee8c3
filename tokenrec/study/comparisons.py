"""Scores that a study compares with its models and that no run of it has.

*Ensembles* average the log-odds of runs: over the seeds of a model, and over models.
*Baselines* are those of `tokenrec evaluate --baselines`, on the inputs of the base config;
where LightGBM is installed it is trained once, and its scores are kept in the folder of
the study.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from tokenrec.data.dataset import Dataset
from tokenrec.data.interaction_log import SCORED
from tokenrec.evaluation.baselines import split_baselines
from tokenrec.evaluation.boosted_trees import LIGHTGBM, BoostedTrees, has_lightgbm
from tokenrec.metrics.exact_auc import CLIP
from tokenrec.runtime.files import atomic_replace
from tokenrec.study.results import ScoredSplit, sort_order

type Scores = Mapping[str, Mapping[int, ScoredSplit]]


def average(
    ensembles: Mapping[str, Sequence[str]], seeds: Sequence[int], scores: Scores
) -> Iterator[tuple[str, ScoredSplit]]:
    """Average the log-odds of models, first over the seeds of each.

    Args:
      ensembles: name -> models.
      seeds: seeds that each model must have.
      scores: model -> seed -> scores of the same impressions.

    Yields:
      Name and scores of each ensemble whose models all have these seeds.
    """
    for name, models in ensembles.items():
        runs = [[scores.get(model, {}).get(seed) for seed in seeds] for model in models]
        # Every model has as many seeds, so that one mean over all runs is the same.
        flat = [run for of_model in runs for run in of_model if run is not None]
        if len(flat) == len(models) * len(seeds):
            yield name, flat[0]._replace(scores=mean_log_odds([r.scores for r in flat]))


def mean_log_odds(probabilities: Sequence[np.ndarray]) -> np.ndarray:
    """The probability whose log-odds are the mean of those of `[N, K]` probabilities.

    >>> mean_log_odds([np.array([0.5]), np.array([0.9])]).round(2).tolist()
    [0.75]
    """
    clipped = [np.clip(p.astype(np.float64), CLIP, 1 - CLIP) for p in probabilities]
    log_odds = np.mean([np.log(p / (1 - p)) for p in clipped], axis=0)
    return (1 / (1 + np.exp(-log_odds))).astype(np.float32)


class Baselines:
    """Baselines of a study.

    Args:
      folder: folder of the study, where the scores of LightGBM are kept.
      dataset: the data set, without the features that the base config excludes.
      tasks: K names.
    """

    def __init__(self, folder: Path, dataset: Dataset, tasks: tuple[str, ...]) -> None:
        self._folder = folder / LIGHTGBM
        self._dataset = dataset
        self._tasks = tasks
        self._trees: BoostedTrees | None = None

    def scores(
        self, split: str, example: ScoredSplit, freeze_at: int | None = None
    ) -> Iterator[tuple[str, ScoredSplit]]:
        """Score the impressions of `example`.

        Args:
          split: the split that they are of.
          example: scores of a run on the split.
          freeze_at: milliseconds at which histories and statistics end.
        """
        log = self._dataset.load(split)
        rows = np.flatnonzero(log.flags & SCORED > 0)
        # A chunk of the log is a run of rows of one user.
        users = np.repeat(log.user_id, np.diff(log.start))
        # The log is in order of chunks, `example` in order of user, item and time.
        order = sort_order(
            users[rows], self._dataset.catalogue.item_id[log.item[rows]], log.time[rows]
        )
        found = split_baselines(self._dataset, split, self._tasks, freeze_at=freeze_at)
        if has_lightgbm():
            found[LIGHTGBM] = self._lightgbm(split, freeze_at)
        for name, probabilities in found.items():
            yield name, example._replace(scores=probabilities[order].astype(np.float32))

    def _lightgbm(self, split: str, freeze_at: int | None) -> np.ndarray:
        """Scores of LightGBM, read if they are kept."""
        path = self._folder / f"{split}{'' if freeze_at is None else '.frozen'}.npy"
        if path.is_file():
            return np.load(path, allow_pickle=False)
        if self._trees is None:
            self._trees = BoostedTrees(self._dataset, self._tasks)
        scores = self._trees.scores(split, freeze_at=freeze_at)
        self._folder.mkdir(exist_ok=True)
        with atomic_replace(path) as partial, open(partial, "wb") as file:
            np.save(file, scores, allow_pickle=False)
        return scores
