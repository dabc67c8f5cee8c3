"""Draw the negatives of Complete Journey: promoted products that a basket lacks.

For each basket, negatives come from its shelf: the products that its store promoted in
its week. They are drawn without replacement, half in proportion to sales and half
uniformly.

Letters: B baskets, N positives, P promotions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tokenrec.data.sources.promotions import PRODUCT_BITS, Promotions

# Rounds of rejection before the few baskets that still lack negatives are drawn
# exactly.
REDRAWS = 16


def draw_negatives(
    promotions: Promotions,
    basket: np.ndarray,
    promotion: np.ndarray,
    sales: np.ndarray,
    negatives: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `negatives` per positive from the basket's shelf, without its own products.

    Half of a basket's negatives are drawn in proportion to `sales`, the others
    uniformly, all without replacement. A half that runs out is filled up by the uniform
    one; a shelf with too few products gives what it has.

    Args:
      promotions: promotions of all stores and weeks.
      basket: `[N] int64`, number of each positive's basket; every number of 0..B - 1
        occurs.
      promotion: `[N] int64`, index of each positive in `promotions`.
      sales: `[P] int32`, weight of each promotion.
      negatives: negatives per positive.
      seed: seed of the draws.

    Returns:
      Basket and promotion of each negative, `[M] int64` both, sorted.
    """
    sampler = _ShelfSampler(promotions, basket, promotion, sales, seed)
    positives_of_basket = np.bincount(basket, minlength=sampler.baskets)
    positives = np.sort(sampler.pairs(basket, promotion))

    # 1. By sales, where the shelf has any.
    by_sales = np.where(sampler.mass > 0, negatives * positives_of_basket // 2, 0)
    taken = sampler.fill(positives, by_sales, sampler.draw_by_sales, uniform=False)

    # 2. Uniformly, all that are missing.
    taken_of_basket = np.bincount(
        taken // sampler.promotions, minlength=sampler.baskets
    )
    missing = (negatives + 1) * positives_of_basket - taken_of_basket
    taken = sampler.fill(taken, missing, sampler.draw_uniformly, uniform=True)

    negative_pairs = taken[~_contains(positives, taken)]
    owner, row = np.divmod(negative_pairs, sampler.promotions)
    return owner, row


class _ShelfSampler:
    """Draws from the shelves of all baskets at once.

    A drawn (basket, promotion) is one integer, `basket * P + promotion`, so that sets
    of draws are sorted arrays.

    Attributes:
      promotions: P.
      baskets: B.
      start: `[B] int64`, first promotion of each basket's shelf.
      stop: `[B] int64`, one beyond its last promotion.
      sales: `[P] int32`, weight of each promotion.
      mass: `[B] int64`, sales of each basket's shelf.
    """

    def __init__(
        self,
        promotions: Promotions,
        basket: np.ndarray,
        promotion: np.ndarray,
        sales: np.ndarray,
        seed: int,
    ) -> None:
        self.promotions = len(promotions.key)
        self.baskets = int(basket.max(initial=-1)) + 1
        # Store and week of a basket are those of any of its positives.
        shelf = np.empty(self.baskets, np.int64)
        shelf[basket] = promotions.key[promotion] >> PRODUCT_BITS
        self.start, self.stop = (
            np.searchsorted(promotions.key, key << PRODUCT_BITS)
            for key in (shelf, shelf + 1)
        )
        self.sales = sales
        self._cumulative = np.zeros(self.promotions + 1, np.int64)
        np.cumsum(sales, out=self._cumulative[1:])
        self.mass = self._cumulative[self.stop] - self._cumulative[self.start]
        self._rng = np.random.default_rng(seed)

    def pairs(self, basket: np.ndarray, promotion: np.ndarray) -> np.ndarray:
        """Pack `[N]` baskets and promotions."""
        return basket * self.promotions + promotion

    def draw_by_sales(self, basket: np.ndarray) -> np.ndarray:
        """Draw a promotion for each of `basket: [N]` in proportion to sales: `[N]`."""
        offset = self._rng.random(len(basket)) * self.mass[basket]
        drawn = self._cumulative[self.start[basket]] + offset.astype(np.int64)
        return np.searchsorted(self._cumulative, drawn, side="right") - 1

    def draw_uniformly(self, basket: np.ndarray) -> np.ndarray:
        """Draw a promotion for each of `basket: [N]` uniformly: `[N]`."""
        offset = self._rng.random(len(basket)) * (self.stop - self.start)[basket]
        return self.start[basket] + offset.astype(np.int64)

    def fill(
        self,
        taken: np.ndarray,
        need: np.ndarray,
        draw: Callable[[np.ndarray], np.ndarray],
        uniform: bool,
    ) -> np.ndarray:
        """Add draws that are not taken yet.

        Args:
          taken: `[T] int64`, sorted pairs.
          need: `[B] int64`, draws to add for each basket.
          draw: `draw_by_sales` or `draw_uniformly`.
          uniform: whether it is the latter.

        Returns:
          Sorted pairs, `taken` and what was added; fewer where a shelf is empty.
        """
        # Rejecting repeats, of draws and of what is taken, draws without replacement.
        for _ in range(REDRAWS):
            if not need.any():
                break
            owner = np.repeat(np.arange(self.baskets), need)
            drawn = np.sort(self.pairs(owner, draw(owner)))
            is_new = (np.diff(drawn, prepend=-1) > 0) & ~_contains(taken, drawn)
            new = drawn[is_new]
            need = need - np.bincount(new // self.promotions, minlength=self.baskets)
            taken = np.sort(np.concatenate([taken, new]))
        # Small shelves may need many rounds; they are few, and drawn one by one.
        parts = [taken]
        for basket in np.flatnonzero(need):
            free = np.arange(self.start[basket], self.stop[basket])
            weight = np.ones(len(free)) if uniform else self.sales[free]
            pairs = basket * self.promotions + free
            free = free[(weight > 0) & ~_contains(taken, pairs)]
            # The smallest of exponentials with these rates are a weighted draw without
            # replacement (Efraimidis and Spirakis, 2006).
            rate = 1 if uniform else self.sales[free]
            arrival = self._rng.exponential(size=len(free)) / rate
            chosen = free[np.argsort(arrival)[: need[basket]]]
            parts.append(basket * self.promotions + chosen)
        return np.sort(np.concatenate(parts))


def _contains(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Find the values that are in a sorted array: `[N] bool`.

    `np.unique` and the set functions built on it hash, and hash packed keys badly: they
    take 0.7 s where a sort takes 0.02 s.
    """
    if not len(ordered):
        return np.zeros(len(values), bool)
    index = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[index] == values
