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
    different = np.unique(ordered)
    # Where most rows share a time, the last two times are valid and test.
    last = [int(time) for time in different[-2:]]
    for begins, least in ((days, _LEAST_SHARE), (exact, 0.0), (last, 0.0)):
        shares = _shares(ordered, begins)
        if len(begins) == 2 and min(shares) > least:
            break
    else:
        raise InputError(
            f"the log has {len(different):,} different times, from "
            f"{iso(int(ordered[0]))} to {iso(int(ordered[-1]))}, and three splits by "
            "time need three; name a finer column with --time COLUMN"
        )
    at_midnight = begins is days
    where = (
        "at midnight (UTC) next to the quantiles"
        if at_midnight
        else "at the quantiles"
        if begins is exact
        else "at the last two times"
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
    if len(begins) < 2:
        return 0.0, 0.0, 0.0
    places = np.searchsorted(ordered, begins) / len(ordered)
    return float(places[0]), float(places[1] - places[0]), float(1 - places[1])
