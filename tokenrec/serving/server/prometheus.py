"""Counters, gauges and histograms in the text format that Prometheus scrapes.

Why not the client library: a server needs three kinds of series and one text format, and
a dependency less in its image.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Iterator, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Values of the labels of a series, in the order of the names of the labels.
type LabelValues = tuple[str, ...]


class Counter:
    """A number that only grows, or one for each combination of label values.

    Methods may be called from any thread.

    Args:
      name: name of the series, with its unit.
      text: what it counts, for `# HELP`.
      labels: names of the labels.
      kind: "counter", or "gauge" for a number that also falls.
    """

    def __init__(
        self, name: str, text: str, labels: Sequence[str] = (), kind: str = "counter"
    ) -> None:
        self.name, self.text, self.kind = name, text, kind
        self._labels = tuple(labels)
        self._lock = threading.Lock()
        # Without labels the series exists from the start, at 0.
        self._values: dict[LabelValues, float] = {} if labels else {(): 0.0}

    def add(self, amount: float, *values: str) -> None:
        """Add to the number with these label values."""
        with self._lock:
            self._values[values] = self._values.get(values, 0.0) + amount

    def set(self, number: float, *values: str) -> None:
        """Set the number with these label values."""
        with self._lock:
            self._values[values] = float(number)

    def value(self, *values: str) -> float:
        """Return the number with these label values; 0 if it was never added to."""
        with self._lock:
            return self._values.get(values, 0.0)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the text format."""
        with self._lock:
            values = dict(self._values)
        yield from _head(self.name, self.text, self.kind)
        for labels, number in values.items():
            yield f"{self.name}{_labels(self._labels, labels)} {_number(number)}"


class Histogram:
    """Counts of observations at most as large as each bound, with their sum.

    Methods may be called from any thread.

    Args:
      name: name of the series, with its unit.
      text: what is observed, for `# HELP`.
      bounds: upper bounds of the buckets, ascending; one without bound is added.
      labels: names of the labels.
    """

    def __init__(
        self, name: str, text: str, bounds: Sequence[float], labels: Sequence[str] = ()
    ) -> None:
        self.name, self.text = name, text
        self._bounds, self._labels = tuple(bounds), tuple(labels)
        self._lock = threading.Lock()
        self._counts: dict[LabelValues, list[int]] = {}
        self._sums: dict[LabelValues, float] = {}

    def observe(self, number: float, *values: str) -> None:
        """Count an observation under these label values."""
        # The first bound that is at least the number: bounds are inclusive.
        bucket = bisect.bisect_left(self._bounds, number)
        with self._lock:
            counts = self._counts.get(values)
            if counts is None:
                counts = self._counts[values] = [0] * (len(self._bounds) + 1)
                self._sums[values] = 0.0
            counts[bucket] += 1
            self._sums[values] += number

    def count(self, *values: str) -> int:
        """Return the number of observations under these label values."""
        with self._lock:
            return sum(self._counts.get(values, ()))

    def sum(self, *values: str) -> float:
        """Return the sum of the observations under these label values."""
        with self._lock:
            return self._sums.get(values, 0.0)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the text format."""
        with self._lock:
            series = [
                (values, list(counts), self._sums[values])
                for values, counts in self._counts.items()
            ]
        yield from _head(self.name, self.text, "histogram")
        bounds = [*map(_number, self._bounds), "+Inf"]
        for values, counts, total in series:
            running = 0
            for bound, count in zip(bounds, counts, strict=True):
                running += count
                labels = _labels((*self._labels, "le"), (*values, bound))
                yield f"{self.name}_bucket{labels} {running}"
            labels = _labels(self._labels, values)
            yield f"{self.name}_sum{labels} {_number(total)}"
            yield f"{self.name}_count{labels} {running}"


def exposition(series: Iterable[Counter | Histogram]) -> bytes:
    """Return the page that Prometheus scrapes."""
    return ("\n".join(line for one in series for line in one.lines()) + "\n").encode()


def _head(name: str, text: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _labels(names: Sequence[str], values: Sequence[str]) -> str:
    if not names:
        return ""
    pairs = zip(names, values, strict=True)
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in pairs) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
