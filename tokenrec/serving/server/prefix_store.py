"""Keep the prefixes of recent requests, so that a user's next request skips them."""

from __future__ import annotations

import dataclasses
import threading
from typing import Protocol

# Name of the loaded model, user, digest of what the prefix was computed from.
type PrefixName = tuple[str, str, bytes]

# Memory of an entry beside its arrays: its name, its place in the dict, the objects.
_ENTRY_BYTES = 1_024


class Sized(Protocol):
    """What the store holds: anything that knows its size."""

    @property
    def nbytes(self) -> int:
        """Size in bytes, on the device and on the host."""
        ...


@dataclasses.dataclass(frozen=True)
class StoreCounts:
    """Counters of a store since it was made, and what it holds now.

    Attributes:
      hits: look-ups that found a prefix.
      misses: look-ups that did not.
      evictions: prefixes dropped to make room.
      refusals: prefixes that were larger than the whole store.
      entries: prefixes held.
      nbytes: their size in bytes.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    refusals: int = 0
    entries: int = 0
    nbytes: int = 0


class PrefixStore[P: Sized]:
    """Least-recently-used cache of prefixes, bounded by their bytes.

    The name of a prefix holds everything that it depends on: the weights and programs
    (name of the loaded model), the user, and the encoded history (its digest). So an
    entry is never stale: a user with a new event has another name, and so has every
    user after a swap of the model.

    All methods may be called from any thread.

    Args:
      capacity: bytes that the prefixes may take; 0 holds none.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._lock = threading.Lock()
        # Ordered by use, the most recent last.
        self._entries: dict[PrefixName, tuple[P, int]] = {}
        self._nbytes = 0
        self._hits = self._misses = self._evictions = self._refusals = 0

    def get(self, name: PrefixName) -> P | None:
        """Return a prefix, which is the most recently used one then, or None."""
        with self._lock:
            entry = self._entries.pop(name, None)
            if entry is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries[name] = entry
            return entry[0]

    def put(self, name: PrefixName, prefix: P) -> None:
        """Hold a prefix; drop the ones that were not used for longest to make room."""
        size = prefix.nbytes + _ENTRY_BYTES
        with self._lock:
            self._remove(name)
            if size > self.capacity:
                self._refusals += 1
                return
            while self._nbytes + size > self.capacity:
                self._remove(next(iter(self._entries)))
                self._evictions += 1
            self._entries[name] = (prefix, size)
            self._nbytes += size

    def drop_model(self, model: str) -> int:
        """Drop all prefixes of a model that no longer serves; return their number."""
        with self._lock:
            names = [name for name in self._entries if name[0] == model]
            for name in names:
                self._remove(name)
            return len(names)

    def clear(self) -> int:
        """Drop all prefixes, to free their memory; return their number."""
        with self._lock:
            count = len(self._entries)
            self._evictions += count
            self._entries.clear()
            self._nbytes = 0
            return count

    def counts(self) -> StoreCounts:
        """Return the counters, all of one moment."""
        with self._lock:
            return StoreCounts(
                self._hits,
                self._misses,
                self._evictions,
                self._refusals,
                len(self._entries),
                self._nbytes,
            )

    def _remove(self, name: PrefixName) -> None:
        _, size = self._entries.pop(name, (None, 0))
        self._nbytes -= size
