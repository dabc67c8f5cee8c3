"""Sum numbers exactly, so that neither their order nor their blocks change the result.

A float32 number is `m * 2**e` with an integer m of 24 bits. The integers are summed by
exponent, and a square is split into two such numbers, so that every sum stays exact in
int64 for up to 2**39 numbers. A normalisation that follows from these sums is the same
bit for bit whatever other rows a log has, however it is cut, on one machine or many.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

_BITS = 24
# Exponents of float32 as `np.frexp` counts them: -148 for the least, 128 for the most.
_LEAST = -148
_EXPONENTS = 128 - _LEAST + 1
# Sums of a block stay exact in the float64 of `np.bincount`: 24 bits and 2**28 numbers.
_BLOCK = 1 << 28


class ExactSums:
    """Count, sum and sum of squares of float32 numbers.

    Attributes:
      count: how many numbers there are.
    """

    def __init__(self) -> None:
        self.count = 0
        # Sums of m by exponent e: of x = m 2**e, and of the upper and lower bits of
        # m**2, which stand for 2**(2e + 24) and 2**(2e).
        self._sums = np.zeros((3, _EXPONENTS), np.int64)

    def add(self, values: np.ndarray) -> None:
        """Add `values: [n] float32`, all finite."""
        for start in range(0, len(values), _BLOCK):
            self._add_block(values[start : start + _BLOCK])

    def merge(self, other: ExactSums) -> None:
        """Add the numbers of `other`."""
        self.count += other.count
        self._sums += other._sums

    def mean_and_variance(self) -> tuple[float, float]:
        """Mean and variance (that of the numbers, divided by n), each rounded once.

        Raises:
          ZeroDivisionError: there is no number.
        """
        total, upper, lower = (
            self._total(row, scale)
            for row, scale in zip(self._sums, (1, 2, 2), strict=True)
        )
        mean = total / self.count
        squares = (upper * 2**_BITS + lower) / self.count
        return float(mean), float(squares - mean**2)

    def _add_block(self, values: np.ndarray) -> None:
        mantissa, exponent = np.frexp(values.astype(np.float64))
        whole = (mantissa * 2.0**_BITS).astype(np.int64)
        square = whole * whole
        place = exponent - _LEAST
        parts = (whole, square >> _BITS, square & ((1 << _BITS) - 1))
        for row, part in zip(self._sums, parts, strict=True):
            sums = np.bincount(place, weights=part, minlength=_EXPONENTS)
            row += sums.astype(np.int64)
        self.count += len(values)

    @staticmethod
    def _total(row: np.ndarray, scale: int) -> Fraction:
        """Sum `row[i] * 2**(scale * (exponent of i - 24))`."""
        least = scale * (_LEAST - _BITS)
        whole = sum(int(value) << (scale * i) for i, value in enumerate(row) if value)
        return Fraction(whole) * Fraction(2) ** least
