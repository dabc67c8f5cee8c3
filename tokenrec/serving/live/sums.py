"""Features that a source itself counts over the past, kept up to date from events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import pyarrow as pa

from tokenrec.data.sources.complete_journey_live import LivePurchases
from tokenrec.errors import InputError


class LiveSums(Protocol):
    """Sums of a source that go on from the end of its log."""

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Row features that they are computed from, beside ids, time and flags."""
        ...

    def check(self, table: pa.Table) -> None:
        """Check that log rows can be counted; raise InputError otherwise."""
        ...

    def count(self, table: pa.Table) -> None:
        """Count log rows, later than the watermark, in the order of time."""
        ...

    def of_rows(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Compute the features of log rows, `[R] float64` each; count nothing."""
        ...

    def forget(self, watermark: int) -> None:
        """Move the watermark, in milliseconds."""
        ...

    def state(self) -> Mapping[str, np.ndarray]:
        """Return the sums at the watermark, as the source's `state`."""
        ...


_SOURCES = {"complete_journey": LivePurchases}


def sum_features(source: str) -> tuple[str, ...]:
    """Names of the features that a source counts, and that can go on from its state."""
    return _SOURCES[source].features if source in _SOURCES else ()


def live_sums(source: str, state: Mapping[str, np.ndarray]) -> LiveSums | None:
    """Return the sums of a source; None of a source without a state.

    Raises:
      InputError: the source counts the past, and its counts cannot be kept up to date.
    """
    if not state:
        return None
    if source not in _SOURCES:
        raise InputError(
            f"source '{source}' counts the past by itself, and its counts "
            f"({', '.join(sorted(state))}) cannot be kept up to date from events; "
            "declare them as statistics (docs/guides/data.md), or send the columns "
            "with each request"
        )
    sums: LiveSums = _SOURCES[source](state)
    return sums
