"""Choose the times at which the valid and the test split begin."""

from __future__ import annotations

import dataclasses

import numpy as np

from tokenrec.data.schema_inference.times import iso
from tokenrec.errors import InputError

DAY_MS = 86_400_000
TRAIN_SHARE, VALID_SHARE = 0.8, 0.1
# Splits begin at midnight if each then keeps at least this share of the log rows.
_LEAST_SHARE = 0.04


@dataclasses.dataclass(frozen=True)
class Splits:
    """The begin of the splits.

    Attributes:
      valid_from: as `--valid-from` reads it.
      test_from: as `--test-from` reads it.
      shares: shares of the log rows in train, valid and test.
      reason: a sentence.
    """

    valid_from: str
    test_from: str
    shares: tuple[float, float, float]
    reason: str


def choose_splits(times: np.ndarray) -> Splits:
    """Split by time, 80/10/10, at midnight (UTC) where the log has enough days.

    Args:
      times: `[n] int64`, milliseconds of log rows, in any order.

    Raises:
      InputError: the log has fewer than three different times.
    """
    ordered = np.sort(times)
    quantiles = [TRAIN_SHARE, TRAIN_SHARE + VALID_SHARE]
    exact = [int(ordered[int(len(ordered) * share)]) for share in quantiles]
    days = [round(time / DAY_MS) * DAY_MS for time in exact]
    for begins, at_midnight in ((days, True), (exact, False)):
        shares = _shares(ordered, begins)
        if min(shares) >= (_LEAST_SHARE if at_midnight else 1e-9):
            break
    else:
        raise InputError(
            f"the log has {len(np.unique(ordered)):,} different times, from "
            f"{iso(ordered[0])} to {iso(ordered[-1])}, and most rows share one, so it "
            "cannot be split by time; name a finer column with --time COLUMN"
        )
    where = (
        "at midnight (UTC) next to the quantiles" if at_midnight else "at the quantiles"
    )
    texts = [iso(time) if at_midnight else str(time) for time in begins]
    return Splits(
        texts[0],
        texts[1],
        shares,
        f"by time, {where}: train, valid and test have {shares[0]:.0%}, "
        f"{shares[1]:.0%} and {shares[2]:.0%} of the rows, and valid begins "
        f"{iso(begins[0])}, test {iso(begins[1])}",
    )


def _shares(ordered: np.ndarray, begins: list[int]) -> tuple[float, float, float]:
    places = np.searchsorted(ordered, begins) / len(ordered)
    return float(places[0]), float(places[1] - places[0]), float(1 - places[1])
