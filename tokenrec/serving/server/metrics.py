"""The series that a server reports at `/metrics`."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence

from tokenrec.serving.server.prefix_store import StoreCounts
from tokenrec.serving.server.prometheus import Counter, Histogram, exposition

# Seconds: a cache hit takes a fraction of a millisecond, a long history a second.
_SECONDS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    10.0,
)
_STATES = {
    "tokenrec_queue_requests": "Requests that wait.",
    "tokenrec_compiles_since_ready": "Shapes compiled after the model was ready; "
    "should stay 0.",
    "tokenrec_prefix_hits_total": "Requests whose prefix was held.",
    "tokenrec_prefix_misses_total": "Requests whose prefix was computed.",
    "tokenrec_prefix_evictions_total": "Prefixes dropped to make room.",
    "tokenrec_prefix_refusals_total": "Prefixes larger than the cache.",
    "tokenrec_prefix_entries": "Prefixes held.",
    "tokenrec_prefix_bytes": "Bytes of the prefixes held.",
}
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class ServerMetrics:
    """Counters, gauges and histograms of a server.

    Attributes:
      requests: answers by path and status.
      seconds: time by stage of a request: read, parse, encode, queue, prefill, extend
        or retrieve, respond, total. Batched stages are observed once per batch.
      batch_requests: requests of a batch.
      batch_failures: batches that raised, and were scored request by request.
      candidates: rows of the device: candidates that it scored, requests that it found
        items for, and what only padded them.
      items: items of answers.
      events: events taken.
      swaps: loads of a model by their outcome, "ok" or "failed".
    """

    def __init__(self) -> None:
        self.requests = Counter(
            "tokenrec_requests_total",
            "Answers by path and HTTP status.",
            ("path", "status"),
        )
        self.seconds = Histogram(
            "tokenrec_stage_seconds",
            "Time by stage; prefill, extend and retrieve once per batch.",
            _SECONDS,
            ("stage",),
        )
        self.batch_requests = Histogram(
            "tokenrec_batch_requests",
            "Requests, or slices of them, of a batch.",
            _COUNTS,
        )
        self.batch_failures = Counter(
            "tokenrec_batch_failures_total",
            "Batches that raised, and were scored request by request.",
        )
        self.candidates = Counter(
            "tokenrec_candidate_rows_total",
            "Rows of the device: candidates, or requests for items, and padding up to a "
            "compiled shape.",
            ("kind",),
        )
        self.items = Counter("tokenrec_retrieved_items_total", "Items of answers.")
        self.events = Counter("tokenrec_events_total", "Events taken.")
        self.swaps = Counter(
            "tokenrec_model_loads_total", "Loads of a model by outcome.", ("outcome",)
        )
        self._feature_values = Counter(
            "tokenrec_feature_values_total",
            "Missing and unknown values by feature; divide by tokenrec_encoded_total.",
            ("feature", "kind"),
        )
        self._encoded = Counter(
            "tokenrec_encoded_total",
            "Requests, candidates and events that were encoded.",
            ("kind",),
        )

    def observe_encoded(
        self,
        candidates: int,
        events: int,
        missing: Mapping[str, int],
        unknown: Mapping[str, int],
        unknown_items: int,
    ) -> None:
        """Count an encoded request and the values of it that the model does not know.

        Args:
          candidates: candidates of the request.
          events: events of its history.
          missing: number of nulls by feature.
          unknown: number of values that training did not see, by feature.
          unknown_items: candidates that the catalogue lacks.
        """
        self._encoded.add(1, "requests")
        self._encoded.add(candidates, "candidates")
        self._encoded.add(events, "events")
        for feature, count in missing.items():
            self._feature_values.add(count, feature, "missing")
        for feature, count in unknown.items():
            self._feature_values.add(count, feature, "unknown")
        if unknown_items:
            self._feature_values.add(unknown_items, "item_id", "unknown")

    def observe_batch(
        self, sizes: Sequence[int], batches: Sequence[int], widths: Sequence[int]
    ) -> None:
        """Count a batch and the padding of its rows.

        Args:
          sizes: candidates of each request of it.
          batches: compiled numbers of requests, ascending.
          widths: compiled numbers of candidates, ascending.
        """
        self.batch_requests.observe(len(sizes))
        rows = padded(len(sizes), batches) * padded(max(sizes), widths)
        self.candidates.add(sum(sizes), "candidate")
        self.candidates.add(rows - sum(sizes), "padding")

    def observe_retrieval(self, found: Sequence[int], batches: Sequence[int]) -> None:
        """Count a batch of requests for items.

        Args:
          found: items of each answer.
          batches: compiled numbers of requests, ascending.
        """
        self.batch_requests.observe(len(found))
        self.items.add(sum(found))
        self.candidates.add(len(found), "request")
        self.candidates.add(padded(len(found), batches) - len(found), "padding")

    def exposition(
        self, digest: str, queued: int, compiles: int, store: StoreCounts
    ) -> bytes:
        """Return the page of `/metrics`.

        Args:
          digest: digest of the artifact that serves.
          queued: requests that wait.
          compiles: shapes compiled since that model was ready.
          store: counters of the prefix store.
        """
        kept = (
            self.requests,
            self.seconds,
            self.batch_requests,
            self.batch_failures,
            self.candidates,
            self.items,
            self.events,
            self.swaps,
            self._feature_values,
            self._encoded,
        )
        model = Counter(
            "tokenrec_model_info", "1 for the model that serves.", ("digest",), "gauge"
        )
        model.set(1, digest)
        numbers = {
            "tokenrec_queue_requests": queued,
            "tokenrec_compiles_since_ready": compiles,
            "tokenrec_prefix_hits_total": store.hits,
            "tokenrec_prefix_misses_total": store.misses,
            "tokenrec_prefix_evictions_total": store.evictions,
            "tokenrec_prefix_refusals_total": store.refusals,
            "tokenrec_prefix_entries": store.entries,
            "tokenrec_prefix_bytes": store.nbytes,
        }
        return exposition([*kept, model, *map(_state, numbers.items())])


def padded(number: int, sizes: Sequence[int]) -> int:
    """Return the smallest compiled size that holds a number.

    Above the largest one it is the number itself, which compiles anew.

    >>> padded(5, (1, 4, 8)), padded(9, (1, 4, 8))
    (8, 9)
    """
    place = bisect.bisect_left(sizes, number)
    return sizes[place] if place < len(sizes) else number


def _state(item: tuple[str, float]) -> Counter:
    """Return the series of a number that is kept elsewhere."""
    name, number = item
    kind = "counter" if name.endswith("_total") else "gauge"
    series = Counter(name, _STATES[name], kind=kind)
    series.set(number)
    return series
