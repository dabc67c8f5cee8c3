"""Keep the two most recent results of an expensive function, across threads."""

from __future__ import annotations

import threading
from collections.abc import Callable


class TwoSlotCache[K, V]:
    """Least-recently-used cache of two results.

    Why two, and why not `functools.lru_cache`: the threads that read ahead are a few
    batches apart, so at most two windows are in use at a time. A third result is made
    only *after* the older of the two is dropped, which bounds memory at two windows;
    lru_cache would hold three for a while. One thread makes a result while the others
    wait, so that no result is made twice.

    Args:
      make: function of a key; its results are cached.
    """

    def __init__(self, make: Callable[[K], V]) -> None:
        self._make = make
        self._lock = threading.Lock()
        # Ordered by use, the most recent last.
        self._results: dict[K, V] = {}

    def get(self, key: K) -> V:
        """Return the result for a key, made now unless it is one of the two."""
        with self._lock:
            if key in self._results:
                self._results[key] = self._results.pop(key)
            else:
                while len(self._results) > 1:
                    del self._results[next(iter(self._results))]
                self._results[key] = self._make(key)
            return self._results[key]
