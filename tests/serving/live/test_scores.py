"""An artifact encodes requests that a live state has completed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokenrec.data.dataset import open_dataset
from tokenrec.serving.artifact import read_artifact
from tokenrec.serving.encoder import Encoder
from tokenrec.serving.live.state import LiveState
from tokenrec.serving.request import Request


def test_a_completed_request_is_encoded_as_one_with_its_history(
    exported_run: tuple[Path, Path],
) -> None:
    run, folder = exported_run
    data = open_dataset(run.parent / "data")
    log = pa.concat_tables([data.to_arrow(split).read_all() for split in data.splits])
    rows = log.sort_by([("time_ms", "ascending")]).to_pylist()
    encoder = Encoder(read_artifact(folder))
    with_history = 0
    state = LiveState.open(folder / "counters", clock=None)
    time = state.last_time_ms + 1
    schema = data.schema
    row_features = [f.name for f in schema.group("row")]
    names = [*row_features, *(f.name for f in schema.group("action"))]
    for user in sorted({row["user_id"] for row in rows})[:10]:
        mine = [row for row in rows if row["user_id"] == user]
        events = [row for row in mine if row["event"] and not row["unknown"]][-6:]
        last = mine[-1]
        if events != mine[-6:]:
            continue
        with_history += 1
        request = Request(
            user={
                "user_id": user,
                **{f.name: last[f.name] for f in schema.group("user")},
            },
            time_ms=time,
            history={},
            context={
                f.name: last[f.name]
                for f in schema.group("row")
                if f.entity == "context"
            },
            candidates={
                name: [last[name]]
                for name in ("item_id", *row_features)
                if name == "item_id" or schema.feature(name).entity == "item"
            },
        )
        own: dict[str, Any] = {
            name: [row[name] for row in events]
            for name in ("time_ms", "item_id", *names)
        }
        one = encoder.encode(state.complete(request))
        other = encoder.encode(dataclasses.replace(request, history=own))
        assert one.prefix_key == other.prefix_key
        assert one.events == len(events)
        np.testing.assert_array_equal(one.target_ids, other.target_ids)
    assert with_history > 2
