"""Read the purchases of Complete Journey: one line per basket and product."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa

from tokenrec.data.sources.promotions import check_key_range
from tokenrec.data.sources.tabular import read_table
from tokenrec.errors import InputError

_COLUMNS = (
    dict.fromkeys(
        ("household_id", "store_id", "basket_id", "product_id", "week"), pa.int64()
    )
    | dict.fromkeys(
        ("quantity", "sales_value", "retail_disc", "coupon_match_disc"), pa.float64()
    )
    | {"transaction_timestamp": pa.timestamp("ms")}
)


@dataclasses.dataclass(frozen=True)
class Purchases:
    """One line per (basket, product), sorted by these; L lines.

    Attributes:
      basket: `[L] int64`, original ids.
      product: `[L] int64`, original ids.
      household: `[L] int64`, original ids.
      store: `[L] int64`, original ids.
      week: `[L] int64`, 1 to 53.
      time: `[L] int64`, seconds since 1970 UTC.
      quantity: `[L] float64`, units.
      sales: `[L] float64`, dollars that the line was sold for.
      discount: `[L] float64`, dollars that the store took off: loyalty discounts and
        matched coupons, not coupons of manufacturers.
    """

    basket: np.ndarray
    product: np.ndarray
    household: np.ndarray
    store: np.ndarray
    week: np.ndarray
    time: np.ndarray
    quantity: np.ndarray
    sales: np.ndarray
    discount: np.ndarray


def read_purchases(path: Path) -> Purchases:
    """Read the transactions.

    Lines of one product in one basket become one; quantities and dollars are added up.

    Raises:
      InputError: the file is not readable, a value is missing, or an id is out of
        range.
    """
    table = read_table(path, _COLUMNS)
    for name in _COLUMNS:
        if table[name].null_count:
            raise InputError(
                f"{path}: {name} is null in {table[name].null_count} lines; a purchase "
                "needs every column; fetch the file again"
            )
    # Milliseconds to seconds.
    time = table["transaction_timestamp"].cast(pa.int64()).to_numpy() // 1000
    value = {
        name: table[name].to_numpy()
        for name in _COLUMNS
        if name != "transaction_timestamp"
    }
    # Store, week and product are looked up as packed keys of promotions.
    for name in ("store_id", "week", "product_id"):
        check_key_range(path, name, value[name])
    order = np.lexsort((value["product_id"], value["basket_id"]))
    basket = value["basket_id"][order]
    product = value["product_id"][order]
    is_first = np.diff(basket, prepend=-1) != 0
    is_first |= np.diff(product, prepend=-1) != 0
    first = np.flatnonzero(is_first)
    first_line = order[first]

    def total(amount: np.ndarray) -> np.ndarray:
        """Sum `amount: [N]` over the lines of each basket and product: `[L]`."""
        # `reduceat` refuses an empty list of starts.
        return np.add.reduceat(amount[order], first) if len(first) else amount

    return Purchases(
        basket=basket[first],
        product=product[first],
        household=value["household_id"][first_line],
        store=value["store_id"][first_line],
        week=value["week"][first_line],
        time=time[first_line],
        quantity=total(value["quantity"]),
        sales=total(value["sales_value"]),
        discount=total(value["retail_disc"] + value["coupon_match_disc"]),
    )
