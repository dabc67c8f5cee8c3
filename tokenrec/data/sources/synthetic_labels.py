"""Generate the synthetic log with labels of every kind, and with weights of rows.

Beside `click` and `buy` each scored row has, with the logit z of its click
(`synthetic_log.py`) and standard logistic noise e and f of its own:

    dwell   exp(2 + z / 2 + e / 4), seconds           a task of numbers
    stars   1 + floor(5 sigmoid(z + f)), 1 to 5       a task of classes

so that a model learns them from the same fields. One label in ten is unknown. Weights
of rows are uniform from 0.5 to 1.5 and carry no information.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from tokenrec.data.schema import Schema, Task
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.data.sources.synthetic_log import TASKS

STARS = ("1", "2", "3", "4", "5")
_KNOWN = 0.9


class LabelKindsSource(SyntheticSource):
    """The synthetic log with the tasks `dwell` and `stars`, and `row_weight`.

    Takes the arguments of `SyntheticSource`.
    """

    schema = Schema(
        SyntheticSource.schema.features,
        (
            *SyntheticSource.schema.tasks,
            Task("dwell", kind="real"),
            Task("stars", kind="classes", classes=STARS),
        ),
        weighted=True,
    )

    def _batch(self, index: np.ndarray) -> pa.RecordBatch:
        batch = super()._batch(index)
        for name, values in self._more_columns(index).items():
            batch = batch.append_column(name, values)
        return batch

    def _more_columns(self, index: np.ndarray) -> dict[str, Any]:
        uniform = self._draws.uniform
        p = self.probabilities(index)[:, list(TASKS).index("click")]
        logit = np.log(p) - np.log1p(-p)
        dwell = np.exp(2 + logit / 2 + _logistic(uniform("dwell", index)) / 4)
        share = 1 / (1 + np.exp(-logit - _logistic(uniform("stars", index))))
        # A share that rounds to 1 is of the last class.
        stars = np.minimum((len(STARS) * share).astype(np.int8), len(STARS) - 1)
        scored = self._is_scored(index)
        unknown = {
            name: ~scored | (uniform(f"{name} known", index) >= _KNOWN)
            for name in ("dwell", "stars")
        }
        return {
            "label_dwell": pa.array(dwell, mask=unknown["dwell"]),
            "label_stars": pa.array(stars, mask=unknown["stars"]),
            "row_weight": pa.array(0.5 + uniform("row weight", index)),
        }


def _logistic(uniform: np.ndarray) -> np.ndarray:
    """Turn uniform numbers into standard logistic ones."""
    u = np.clip(uniform, 1e-12, 1 - 1e-12)
    return np.log(u) - np.log1p(-u)
