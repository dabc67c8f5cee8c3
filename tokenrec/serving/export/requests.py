"""Write the samples of a prepared split as requests, with their predictions.

`tokenrec export` compares the scores of its artifact with those of `tokenrec predict` on
these. They hold the history that `predict` reads, the columns of the log rows and their
statistics of the past: what a caller would have sent at the time.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from tokenrec.checkpoint.run_folder import OpenedRun
from tokenrec.config.backbones import reads_event_ages
from tokenrec.data.arrow_rows import RowDecoder
from tokenrec.data.batch import Batch
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.interaction_log import InteractionLog
from tokenrec.data.sample_positions import Positions, locate
from tokenrec.data.schema import Feature, Schema
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.data.windows import Windows
from tokenrec.evaluation.evaluate import jit_eval_step, make_retrieval_step
from tokenrec.sharding import to_devices, to_host
from tokenrec.task_plan import evaluated_tasks

# Scored events that are taken of one stream (UC).
_OF_STREAM = 4


class PredictedRequest(NamedTuple):
    """A request and its predictions.

    Attributes:
      request: as a caller sends it, of JSON values.
      predictions: `[C, O] float32`, those of `tokenrec predict`.
    """

    request: dict[str, Any]
    predictions: np.ndarray


def predicted_requests(
    run: OpenedRun, split: str, mesh: Mesh, count: int | None
) -> Iterator[PredictedRequest]:
    """Yield at most `count` requests of a split, spread evenly over it.

    Args:
      run: a ranking run.
      split: name of the split.
      mesh: the mesh in use, which holds the weights.
      count: number of requests; in UC of scored events. None: all that `tokenrec
        predict` scores; a request with more candidates than a sample holds is several.
    """
    step = jit_eval_step(run.model)
    config = run.model.config
    outputs = list(evaluated_tasks(run.model.task_plans, config.data.auxiliary).outputs)
    decoder = RequestDecoder(run.dataset, run.model.schema)
    uc = config.data.paradigm == "uc"
    samples = -(-count // _OF_STREAM) if uc and count is not None else count
    left = sys.maxsize if count is None else count
    of_stream = sys.maxsize if count is None else _OF_STREAM
    for part in _batches(run, split, samples):
        predictions = to_host(step(run.state, to_devices(part.batch, mesh)))
        predictions = np.asarray(predictions)[..., outputs]
        for row in np.flatnonzero(part.positions.present):
            places = np.flatnonzero(part.positions.read[row])
            if not len(places) or not left:
                continue
            if not uc:
                rows = part.positions.rows[row][part.positions.valid[row]]
                request = decoder.request(
                    part.log, rows, part.positions.reads[row][places]
                )
                yield PredictedRequest(request, predictions[row, places])
                left -= 1
                continue
            for place in _some(places, min(of_stream, left)):
                before = part.positions.valid[row].copy()
                before[place:] = False
                request = decoder.request(
                    part.log,
                    part.positions.rows[row][before],
                    part.positions.rows[row][[place]],
                )
                yield PredictedRequest(request, predictions[row, [place]])
                left -= 1


class PredictedItems(NamedTuple):
    """A request for items, and its answer.

    Attributes:
      request: as a caller sends it, of JSON values.
      items: n original ids, those of `tokenrec predict`, best first.
      scores: `[n] float32`.
    """

    request: dict[str, Any]
    items: list[Any]
    scores: np.ndarray


def predicted_items(
    run: OpenedRun, split: str, mesh: Mesh, count: int
) -> Iterator[PredictedItems]:
    """Yield at most `count` requests of a split, spread evenly over it.

    Args:
      run: a retrieval run.
      split: name of the split.
      mesh: the mesh in use, which holds the weights.
      count: number of requests.
    """
    step = make_retrieval_step(run.model, run.dataset)
    decoder = RequestDecoder(run.dataset, run.model.schema)
    ids = run.dataset.catalogue.item_id
    for part in _batches(run, split, count):
        found = to_host(step(run.state, to_devices(part.batch, mesh)))
        for row in np.flatnonzero(part.positions.present):
            history = part.positions.rows[row][part.positions.valid[row]]
            # The request has the user, the time and the context of its first goal.
            goal = part.positions.reads[row, 0, :1]
            request = decoder.request(part.log, history, goal)
            del request["candidates"]
            exists = found.items[row] >= 0
            yield PredictedItems(
                request,
                ids[found.items[row][exists]].tolist(),
                np.asarray(found.scores[row][exists]),
            )


class RequestDecoder:
    """Make requests of log rows, with their original values.

    A value that training has not seen is not kept by a data set; another one that
    training has not seen either stands for it.

    Args:
      dataset: the data set.
      schema: features of the model.
    """

    def __init__(self, dataset: Dataset, schema: Schema) -> None:
        wanted = {f.name for f in schema.features if f.group != "catalogue"}
        others = [f.name for f in dataset.metadata.schema.features]
        # Features of items come from the catalogue of the artifact.
        rows = open_dataset(
            dataset.directory, [name for name in others if name not in wanted]
        )
        rows.schema = dataclasses.replace(rows.schema, tasks=())
        self._rows = RowDecoder(rows)
        self._schema = rows.schema
        self._unseen = {
            f.table_name: _unseen_value(
                load_vocabulary(dataset.directory, f.table_name)
            )
            for f in rows.schema.features
            if f.has_vocabulary
        }

    def request(
        self, log: InteractionLog, history: np.ndarray, candidates: np.ndarray
    ) -> dict[str, Any]:
        """Make a request.

        Args:
          log: the log, with the ids of the data set.
          history: `[E] int64`, its rows that are the history, oldest first.
          candidates: `[C] int64`, those that are scored.
        """
        scored = self._columns(log, candidates)
        user = {f.name: scored[f.name][0] for f in self._schema.group("user")}
        request: dict[str, Any] = {
            "user": {"user_id": scored["user_id"][0]} | user,
            "time_ms": scored["time_ms"][0],
        }
        row, action = self._schema.group("row"), self._schema.group("action")
        if len(history):
            events = self._columns(log, history)
            names = ["time_ms", "item_id", *(f.name for f in (*row, *action))]
            request["history"] = {name: events[name] for name in names}
        request["context"] = {}
        request["candidates"] = {"item_id": scored["item_id"]}
        for f in row:
            values = scored[f.name]
            # The rows of a request share their context, unless a source says otherwise.
            if f.entity == "context" and all(value == values[0] for value in values):
                request["context"][f.name] = values[0]
            else:
                request["candidates"][f.name] = values
        return request

    def _columns(self, log: InteractionLog, rows: np.ndarray) -> dict[str, list[Any]]:
        columns = self._rows.decode(log, rows).to_pydict()
        unknown = columns["unknown"]
        for f in self._schema.features:
            if f.has_vocabulary:
                unseen = self._unseen[f.table_name]
                columns[f.name] = [
                    _with_unseen(f, value, f.name in names, unseen)
                    for value, names in zip(columns[f.name], unknown, strict=True)
                ]
        return columns


class _Part(NamedTuple):
    """A batch of evaluation, its samples, and the log with the ids of the data set."""

    batch: Batch
    positions: Positions
    log: InteractionLog


def _batches(run: OpenedRun, split: str, count: int | None) -> Iterator[_Part]:
    """Yield batches of the samples of `count` requests or streams, evenly spread.

    None: all samples.
    """
    config = run.model.config
    ages = reads_event_ages(config.model)
    windows = Windows(run.dataset, config.data, split, train=False, ages=ages)
    ends = np.cumsum([plan.requests for plan in windows.plans])
    total = int(ends[-1])
    most = total if count is None else min(count, total)
    wanted = np.arange(most) * total // most
    size = config.data.eval_batch_size
    goals = config.data.objective == "retrieval"
    for number, (plan, end) in enumerate(zip(windows.plans, ends, strict=True)):
        begin = end - plan.requests
        requests = wanted[(wanted >= begin) & (wanted < end)] - begin
        if not len(requests):
            continue
        window = windows.load(number)
        request = np.cumsum(window.samples.opens) - 1
        # Of a request with more candidates than a sample holds, the first ones.
        first = window.samples.opens | (count is None)
        chosen = np.flatnonzero(np.isin(request, requests) & first)
        log = run.dataset.load(split, plan.start, plan.stop)
        for bucket, length in enumerate(windows.lengths):
            members = chosen[window.bucket[chosen] == bucket]
            for start in range(0, len(members), size):
                batch = np.full(size, -1, np.int64)
                part = members[start : start + size]
                batch[: len(part)] = part
                positions = locate(
                    window.samples, batch, length, config.data.candidates, goals=goals
                )
                yield _Part(windows.gather(number, batch, length).batch, positions, log)


def _some(places: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of some places, evenly spread, the last one among them."""
    if len(places) <= count:
        return places
    return places[len(places) - 1 - np.arange(count)[::-1] * len(places) // count]


def _with_unseen(f: Feature, value: Any, unknown: bool, unseen: Any) -> Any:
    if not unknown:
        return value
    if f.kind == "categorical":
        return unseen
    return [unseen if inner is None else inner for inner in value]


def _unseen_value(known: np.ndarray) -> str | int:
    """A value that a vocabulary does not hold."""
    if known.dtype == object:
        texts, value = set(known.tolist()), "<unseen>"
        while value in texts:
            value += "_"
        return value
    number = -1
    numbers = set(known.tolist())
    while number in numbers:
        number -= 1
    return number
