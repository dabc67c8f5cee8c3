"""Compute the columns of Complete Journey's log rows, for purchases and impressions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

from tokenrec.data.past_counts import PastCounts
from tokenrec.data.sources.complete_journey_purchases import Purchases
from tokenrec.data.sources.promotions import PRODUCT_BITS, Promotions

VALID_WEEK, TEST_WEEK = 43, 48  # the first of each split
LAST_WEEK = 53
RECENT_WEEKS = 4  # of product_sales

# Times of the file are UTC. Stores keep the time of New York, at whose midnight a week
# begins: UTC - 5 h, and UTC - 4 h between these two times of 2017.
SUMMER = (
    np.datetime64("2017-03-12T07:00", "s").astype(np.int64),
    np.datetime64("2017-11-05T06:00", "s").astype(np.int64),
)
HOUR, DAY = 3600, 86400


@dataclasses.dataclass(frozen=True)
class RowBatches:
    """Make record batches of log rows.

    Attributes:
      purchases: all purchases.
      promotions: all promotions.
      household_purchases: baskets by household and product, in time.
      product_sales: baskets by product, in weeks.
    """

    purchases: Purchases
    promotions: Promotions
    household_purchases: PastCounts
    product_sales: PastCounts

    def make(
        self,
        line: np.ndarray,
        product: np.ndarray,
        promotion: np.ndarray,
        label: np.ndarray | None,
    ) -> pa.RecordBatch:
        """Make a batch of events (`label` None) or of impressions.

        Args:
          line: `[n] int64`, a line of each row's basket; for events the row's own line.
          product: `[n] int64`.
          promotion: `[n] int64`, index of the product's promotion; -1 for none.
          label: `[n] int8`, 1 for a product that the basket holds.
        """
        household = self.purchases.household[line]
        store = self.purchases.store[line]
        week = self.purchases.week[line]
        time = self.purchases.time[line]
        is_summer = (time >= SUMMER[0]) & (time < SUMMER[1])
        local_time = time - np.where(is_summer, 4 * HOUR, 5 * HOUR)
        is_event = np.full(len(line), label is None)
        split = (week >= VALID_WEEK).astype(np.int8) + (week >= TEST_WEEK)
        household_product = household << PRODUCT_BITS | product
        # Weeks strictly before this one: its own sales are known only when it is over.
        recent_sales = self.product_sales.before(product, week)
        recent_sales -= self.product_sales.before(product, week - RECENT_WEEKS)
        columns = {
            "user_id": household,
            "item_id": product,
            "time_ms": time * 1000,
            "split": split.astype(np.int8),
            "event": is_event,
            "scored": ~is_event,
            "request": self.purchases.basket[line],
            "label_bought": pa.nulls(len(line), pa.int8()) if label is None else label,
            "store_id": store,
            "week": week.astype(np.float32),
            "hour": local_time % DAY // HOUR,
            # Monday is 0; 1 January 1970 was a Thursday (3).
            "weekday": (local_time // DAY + 3) % 7,
            "display_location": _places(self.promotions.display, promotion),
            "mailer_location": _places(self.promotions.mailer, promotion),
            "household_purchases": self.household_purchases.before(
                household_product, time
            ).astype(np.float32),
            "product_sales": recent_sales.astype(np.float32),
        }
        return pa.RecordBatch.from_pydict(
            columns | self._action_columns(line, label is None)
        )

    def _action_columns(self, line: np.ndarray, is_event: bool) -> dict[str, pa.Array]:
        """Columns of the purchase itself, null for impressions."""
        if not is_event:
            nulls = pa.nulls(len(line), pa.float32())
            return dict.fromkeys(("quantity", "unit_price", "discount_share"), nulls)
        quantity = self.purchases.quantity[line]
        sales = self.purchases.sales[line]
        discount = self.purchases.discount[line]
        list_price = sales + discount
        # The divisors of masked values are replaced, so that nothing divides by zero.
        price = sales / np.where(quantity > 0, quantity, 1)
        share = discount / np.where(list_price > 0, list_price, 1)
        return {
            "quantity": pa.array(quantity.astype(np.float32)),
            "unit_price": pa.array(price.astype(np.float32), mask=quantity <= 0),
            "discount_share": pa.array(share.astype(np.float32), mask=list_price <= 0),
        }


def _places(letters: np.ndarray, promotion: np.ndarray) -> pa.Array:
    """Return the place of each row's promotion as a string, null without a promotion.

    Args:
      letters: `[P] uint8`, ASCII characters.
      promotion: `[n] int64`, index of the promotion; -1 for none.
    """
    if not len(letters):
        return pa.nulls(len(promotion), pa.string())
    places = pa.array(
        letters[promotion].view("S1"), type=pa.binary(), mask=promotion < 0
    )
    return places.cast(pa.string())
