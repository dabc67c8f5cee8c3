"""The page of /metrics is in the text format, and its histograms add up."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from tokenrec.serving.server.metrics import ServerMetrics, padded
from tokenrec.serving.server.prefix_store import StoreCounts
from tokenrec.serving.server.prometheus import Counter, Histogram, exposition

LINE = re.compile(
    r'^[a-z_]+(\{[a-z_]+="(?:[^"\\\n]|\\.)*"(,[a-z_]+="(?:[^"\\\n]|\\.)*")*\})? [-0-9.e+]+$'
)


def values(page: bytes) -> dict[str, float]:
    lines = [line for line in page.decode().splitlines() if not line.startswith("#")]
    return {
        series: float(number)
        for series, _, number in (line.rpartition(" ") for line in lines)
    }


def test_a_histogram_counts_each_observation_in_the_first_bound_that_holds_it() -> None:
    seconds = Histogram("seconds", "Time.", (0.1, 1.0), ("stage",))
    for number in (0.05, 0.1, 0.1000001, 1.0, 5.0):
        seconds.observe(number, "read")
    assert values(exposition([seconds])) == {
        'seconds_bucket{stage="read",le="0.1"}': 2,
        'seconds_bucket{stage="read",le="1"}': 4,
        'seconds_bucket{stage="read",le="+Inf"}': 5,
        'seconds_sum{stage="read"}': 0.05 + 0.1 + 0.1000001 + 1.0 + 5.0,
        'seconds_count{stage="read"}': 5,
    }
    assert seconds.count("read") == 5
    assert seconds.count("other") == 0


@given(st.text(max_size=20), st.text(max_size=20))
def test_label_values_cannot_break_the_format(first: str, second: str) -> None:
    counter = Counter("things_total", "Things.", ("feature", "kind"))
    counter.add(1, first, second)
    # A line of the format ends at a line feed alone.
    head, kind, line, end = exposition([counter]).decode().split("\n")
    assert (head, kind) == (
        "# HELP things_total Things.",
        "# TYPE things_total counter",
    )
    assert LINE.match(line)
    assert end == ""


def test_the_padding_is_what_the_compiled_shape_has_beyond_the_candidates() -> None:
    metrics = ServerMetrics()
    metrics.observe_batch([20, 9, 30], (1, 2, 4), (8, 16, 32))
    metrics.observe_batch([8], (1, 2, 4), (8, 16, 32))
    page = values(metrics.exposition("abc", 3, 0, StoreCounts(hits=2, misses=1)))
    assert page['tokenrec_candidate_rows_total{kind="candidate"}'] == 20 + 9 + 30 + 8
    assert page['tokenrec_candidate_rows_total{kind="padding"}'] == 4 * 32 - 59
    assert page["tokenrec_batch_requests_sum"] == 4
    assert page['tokenrec_model_info{digest="abc"}'] == 1
    assert page["tokenrec_queue_requests"] == 3
    assert page["tokenrec_prefix_hits_total"] == 2
    assert page["tokenrec_compiles_since_ready"] == 0
    assert padded(40, (8, 16, 32)) == 40


def test_missing_and_unknown_values_are_counted_by_feature() -> None:
    metrics = ServerMetrics()
    for _ in range(2):
        metrics.observe_encoded(5, 7, {"age": 1}, {"brand": 2}, 3)
    page = values(metrics.exposition("abc", 0, 0, StoreCounts()))
    series = "tokenrec_feature_values_total"
    assert page[series + '{feature="age",kind="missing"}'] == 2
    assert page[series + '{feature="brand",kind="unknown"}'] == 4
    assert page[series + '{feature="item_id",kind="unknown"}'] == 6
    assert page['tokenrec_encoded_total{kind="requests"}'] == 2
    assert page['tokenrec_encoded_total{kind="candidates"}'] == 10
    assert page['tokenrec_encoded_total{kind="events"}'] == 14
