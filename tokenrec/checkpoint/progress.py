"""What a training run has reached besides its weights, kept with each checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Progress:
    """State of the training loop besides weights and optimizer.

    Attributes:
      best: value of the best evaluation, higher is better; None before the first one.
      best_step: step of the best evaluation, the earliest of equal ones; -1 before the
        first one.
      waited: evaluations since the best one, for `train.patience`.
      skipped: steps whose update was skipped.
      assessed: False if a signal stopped the run before the evaluation that was due at
        this step; a resumed run then repeats it.
      step: updates made. A checkpoint does not repeat it: its folder is named by it.
      criterion: what `best` is a value of, such as "macro_auc on valid"; empty in runs
        from before it was kept.
    """

    # The names are keys of the JSON value beside a checkpoint.
    best: float | None = None
    best_step: int = -1
    waited: int = 0
    skipped: int = 0
    assessed: bool = True
    step: int = 0
    criterion: str = ""

    def after_evaluation(self, value: float | None) -> Progress:
        """Progress after an evaluation of this step; `value` is None if undefined."""
        if value is not None and (self.best is None or value > self.best):
            return dataclasses.replace(
                self, best=value, best_step=self.step, waited=0, assessed=True
            )
        return dataclasses.replace(self, waited=self.waited + 1, assessed=True)

    def compared_by(self, criterion: str) -> Progress:
        """Progress of a run that compares its evaluations by `criterion`.

        Values of two criteria cannot be compared, so that with another one the search
        for the best checkpoint begins again, with the evaluation of this step.
        """
        if self.criterion in ("", criterion):
            return dataclasses.replace(self, criterion=criterion)
        return dataclasses.replace(
            self, best=None, best_step=-1, waited=0, assessed=False, criterion=criterion
        )

    def to_json(self) -> dict[str, Any]:
        """JSON value that is kept beside a checkpoint."""
        values = dataclasses.asdict(self)
        del values["step"]
        return values

    @classmethod
    def from_json(cls, value: Mapping[str, Any], step: int) -> Progress:
        """Read what `to_json` of this or an earlier version returned."""
        return cls(**(dict(value) | {"step": step}))
