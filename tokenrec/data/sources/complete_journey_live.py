"""Keep the purchase counts of Complete Journey up to date, purchase by purchase.

`complete_journey.py` counts a whole log at once (`PastCounts`); here the same counts go
on from the state that it ended with, as `LiveTotals` of whole numbers:

- `household_purchases`: by household and product, strictly earlier purchases;
- `product_sales`: by product and week, the four weeks before that of the row.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from tokenrec.data.past.live_totals import LiveTotals
from tokenrec.data.past.measures import flags
from tokenrec.data.past.totals import KeyTotals
from tokenrec.data.sources.complete_journey_rows import RECENT_WEEKS
from tokenrec.data.sources.promotions import PRODUCT_BITS
from tokenrec.errors import InputError

_FIRST_WEEK = "product_sales_first_week"
_WEEK_BITS = 16
# Household and product fit into 63 bits together.
_BITS = {"user_id": 38, "item_id": PRODUCT_BITS, "week": _WEEK_BITS}


class LivePurchases:
    """The counts of Complete Journey, as `live_sums.LiveSums`.

    Args:
      state: what `CompleteJourneySource.state` returned.
    """

    features = ("household_purchases", "product_sales")
    columns = ("week",)

    def __init__(self, state: Mapping[str, np.ndarray]) -> None:
        self._purchases = _counts(
            state["household_purchases_keys"], state["household_purchases_counts"]
        )
        product = state["product_sales_products"]
        week = state["product_sales_weeks"].astype(np.int64)
        sales = _by_week(product, week)
        self._sales = _counts(*np.unique(sales, return_counts=True))
        # The source ends with a week, and keeps what the next one needs.
        first = week.max(initial=0) - RECENT_WEEKS + 1
        self._first_week = int(state.get(_FIRST_WEEK, first))

    def check(self, table: pa.Table) -> None:
        """Check that the ids and weeks of log rows can be counted.

        Raises:
          InputError: one is missing or out of range.
        """
        _columns(table)

    def count(self, table: pa.Table) -> None:
        """Count the purchases among log rows in the order of time."""
        table = table.filter(pa.array(flags(table, "event")))
        household, product, week, time = _columns(table)
        one = np.ones((len(time), 1))
        self._purchases.count(_by_household(household, product), time, one)
        self._sales.count(_by_week(product, week).astype(np.uint64), time, one)

    def of_rows(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Count what is strictly earlier than log rows: `[R] float64` each."""
        household, product, week, time = _columns(table)
        keys = _by_household(household, product)
        (purchases,) = self._purchases.update(keys, time, np.zeros((len(time), 1)))
        missing = np.maximum(week - RECENT_WEEKS, 1) < self._first_week
        if missing.any():
            raise InputError(
                f"column 'week': week {week[missing][0]} needs the sales of the "
                f"{RECENT_WEEKS} weeks before it, and those before week "
                f"{self._first_week} are not kept; send the week of now"
            )
        # The weeks strictly before this one, one after another; none is before week 0.
        weeks = week[:, None] - np.arange(1, RECENT_WEEKS + 1)
        products = np.broadcast_to(product[:, None], weeks.shape)
        times = np.broadcast_to(time[:, None], weeks.shape)
        keys = _by_week(products, np.maximum(weeks, 0)).astype(np.uint64)
        (sales,) = self._sales.update(
            keys.ravel(), times.ravel(), np.zeros((keys.size, 1))
        )
        of_weeks = np.where(weeks < 0, 0.0, sales.reshape(weeks.shape))
        return {
            "household_purchases": purchases[:, 0],
            "product_sales": of_weeks.sum(axis=1),
        }

    def forget(self, watermark: int) -> None:
        """Move the watermark: times until then are neither counted nor asked for."""
        self._purchases.forget(watermark)
        self._sales.forget(watermark)

    def state(self) -> dict[str, np.ndarray]:
        """Return the counts at the watermark, as `CompleteJourneySource.state`.

        The first week whose sales are kept is added.
        """
        purchases, sales = self._purchases.state(), self._sales.state()
        keys, count = sales["keys"].astype(np.int64), sales["sums_0"][:, 0]
        week = keys & ((1 << _WEEK_BITS) - 1)
        # The week of the last purchase may go on.
        first = max(
            self._first_week, int(week[count > 0].max(initial=0)) - RECENT_WEEKS
        )
        recent = week >= first
        product = keys >> _WEEK_BITS
        return {
            "household_purchases_keys": purchases["keys"].astype(np.int64),
            "household_purchases_counts": purchases["sums_0"][:, 0],
            "product_sales_products": product[recent].repeat(count[recent]),
            "product_sales_weeks": week[recent].repeat(count[recent]),
            _FIRST_WEEK: np.array(first),
        }


def _counts(keys: np.ndarray, counts: np.ndarray) -> LiveTotals:
    """Counts of all the past, by ascending keys."""
    totals = KeyTotals(np.ones(1), [None])
    totals.resume({"keys": keys.astype(np.uint64), "sums_0": counts[:, None]})
    return LiveTotals(totals)


def _by_household(household: np.ndarray, product: np.ndarray) -> np.ndarray:
    return (household << PRODUCT_BITS | product).astype(np.uint64)


def _by_week(product: np.ndarray, week: np.ndarray) -> np.ndarray:
    return product << _WEEK_BITS | week


def _columns(table: pa.Table) -> list[np.ndarray]:
    """Household, product, week and time of log rows: `[R] int64` each."""
    columns = []
    for name, bits in _BITS.items():
        # A null would become NaN, which fails the comparison.
        values = table[name].cast(pa.float64()).to_numpy()
        whole = (values >= 0) & (values < 1 << bits) & (np.floor(values) == values)
        if not whole.all():
            raise InputError(
                f"column '{name}': a value is missing or not a whole number from 0 to "
                f"{(1 << bits) - 1}; purchases are counted by it; correct it"
            )
        columns.append(values.astype(np.int64))
    return [*columns, table["time_ms"].to_numpy()]
