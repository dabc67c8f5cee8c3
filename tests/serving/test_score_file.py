"""A file of requests is answered a part at a time, in one table."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenrec.serving.score_file import score_file


class Ones:
    """Scores every candidate 1."""

    outputs = ("score_bought",)

    def encode(self, request):
        unknown = SimpleNamespace(rows=())
        return SimpleNamespace(unknown=unknown, candidates=request.candidate_count)

    def score(self, requests):
        return [np.ones((one.candidates, 1), np.float32) for one in requests]


def test_the_first_users_may_be_unknown(tmp_path):
    # More requests than are in memory at a time.
    users = [None] * 100 + [7]
    requests = [
        {"user": {"user_id": user}, "time_ms": 1, "candidates": {"item_id": [3, 4]}}
        for user in users
    ]
    pq.write_table(pa.Table.from_pylist(requests), tmp_path / "requests.parquet")
    count = score_file(Ones(), tmp_path / "requests.parquet", tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert count == table.num_rows == 202
    assert table["user_id"].to_pylist() == [user for user in users for _ in "ab"]
    assert table.schema.names == [
        *("request", "user_id", "item_id", "time_ms", "known_item", "score_bought")
    ]
