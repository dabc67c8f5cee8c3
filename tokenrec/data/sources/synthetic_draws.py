"""Draw random numbers that are a function of a seed, a name and an index.

The n-th row of the synthetic log must be the same whatever rows were drawn before, so
that batches, parts and machines agree. A generator with a state cannot do that; a hash
of (seed, name, index) can.
"""

from __future__ import annotations

import hashlib

import numpy as np


class Draws:
    """Random numbers by name and index.

    Args:
      seed: seed of all draws.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def uniform(self, name: str, index: np.ndarray) -> np.ndarray:
        """Draw numbers in [0, 1).

        Args:
          name: name of the quantity; each name has a stream of its own.
          index: `[...] int64`.

        Returns:
          `[...] float64`.
        """
        digest = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=8)
        key = np.frombuffer(digest.digest(), "<u8")
        mixed = _split_mix(key + index.astype(np.uint64))
        # A float64 has 53 bits: the upper 53 of 64.
        return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integers(self, name: str, index: np.ndarray, bound: int) -> np.ndarray:
        """Draw integers in [0, bound).

        Args:
          name: name of the quantity; each name has a stream of its own.
          index: `[...] int64`.
          bound: number of values.

        Returns:
          `[...] int64`.
        """
        return (self.uniform(name, index) * bound).astype(np.int64)


def _split_mix(x: np.ndarray) -> np.ndarray:
    """Apply SplitMix64 to `x: [...] uint64`.

    Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
