"""Prepared log to batches: the batch of step i is a function of (data, config, seed, i), on any number of processes.

A split is read in *windows*, runs of whole chunks with about `config.window_rows` rows. An epoch visits the windows in
random order; in a window, samples are permuted inside their bucket of stream lengths, cut into batches, and the batches
permuted. What does not fill a batch of its bucket joins the next longer one, so that a window loses less than one
batch an epoch. Position is a step number, so resuming costs nothing and needs no state but that number.

Every process holds whole windows and knows whole batches; it gathers the samples of its own devices alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import grain
import jax
import numpy as np

from tokenrec.config import DataConfig
from tokenrec.data.batch import Batch, HostBatch, ReadRows, Signals
from tokenrec.data.gather import ContextColumns, gather, rows_read
from tokenrec.data.interaction_log import Catalogue, InteractionLog
from tokenrec.data.metadata import Metadata
from tokenrec.data.samples import Samples, Streams, cut_samples
from tokenrec.data.schema import Feature, Schema, columns
from tokenrec.errors import InputError, suggest

READ_THREADS = 2
BATCHES_AHEAD = 4


class LogReader(Protocol):
    """A prepared data set, such as `open_dataset` returns."""

    @property
    def metadata(self) -> Metadata: ...

    @property
    def schema(self) -> Schema: ...

    @property
    def catalogue(self) -> Catalogue: ...

    @property
    def splits(self) -> Sequence[str]: ...

    def chunk_lengths(self, split: str) -> np.ndarray: ...

    def load(
        self, split: str, start: int = 0, stop: int | None = None
    ) -> InteractionLog: ...


def task_names(schema: Schema, config: DataConfig) -> tuple[str, ...]:
    """Tasks in the order of the label columns of a batch: `config.tasks`, or all of the schema's if it is empty.

    Retrieval: the task of `config.positive`, or none.

    Raises:
      InputError: the data set has no such task, or none at all to rank by.
    """
    known = tuple(task.name for task in schema.tasks)
    if config.objective == "retrieval":
        if config.positive and config.positive not in known:
            raise InputError(
                f"data.positive: the data set has no task '{config.positive}'{suggest(config.positive, known)}"
            )
        return (config.positive,) if config.positive else ()
    if not known:
        raise InputError(
            "data.objective='ranking', but the data set has no task, only events; use data.objective='retrieval'"
        )
    for name in config.tasks:
        if name not in known:
            raise InputError(
                f"data.tasks: the data set has no task '{name}'{suggest(name, known)}"
            )
    return tuple(config.tasks) or known


def batch_shapes(
    schema: Schema, config: DataConfig, *, batch_size: int, ages: bool = False
) -> dict[int, Batch]:
    """Stream length -> `Batch` of `jax.ShapeDtypeStruct`, for every length that a pipeline yields; `ages` as there."""
    tasks = len(task_names(schema, config))
    retrieval = config.objective == "retrieval"

    def signals(features: Sequence[Feature], *axes: int) -> Signals:
        widths = columns(features)
        return Signals(
            jax.ShapeDtypeStruct((*axes, widths.ids_width), np.int32),
            jax.ShapeDtypeStruct((*axes, widths.dense_width), np.float32),
        )

    def batch(length: int) -> Batch:
        nio = config.paradigm == "nio"
        read = config.candidates if nio else length
        goals = (batch_size, 1, config.candidates) if nio else (batch_size, length, 1)
        if retrieval:
            read = 1 if nio else length
        return Batch(
            user=signals(schema.group("user"), batch_size),
            state=signals(schema.state, batch_size, length),
            action=signals(schema.group("action"), batch_size, length),
            valid=jax.ShapeDtypeStruct((batch_size, length), np.bool_),
            target=signals(schema.state, batch_size, read) if nio else None,
            labels=None
            if retrieval
            else jax.ShapeDtypeStruct((batch_size, read, tasks), np.int8),
            weight=jax.ShapeDtypeStruct((batch_size, read), np.float32),
            items=jax.ShapeDtypeStruct((batch_size, length), np.int32)
            if retrieval
            else None,
            goals=jax.ShapeDtypeStruct(goals, np.int32) if retrieval else None,
            codes=jax.ShapeDtypeStruct((*goals, len(schema.levels)), np.int32)
            if retrieval and schema.levels
            else None,
            ages=jax.ShapeDtypeStruct((batch_size, length), np.int32) if ages else None,
        )

    return {length: batch(length) for length in stream_lengths(config)}


def stream_lengths(config: DataConfig) -> tuple[int, ...]:
    """The T of each bucket, shortest first."""
    return tuple(sorted({*config.buckets, config.events}))


def steps_per_epoch(dataset: LogReader, config: DataConfig) -> int:
    """Full training batches of one epoch. Reads the split once."""
    return _TrainOrder(
        _Windows(dataset, config, "train", train=True), 0
    ).steps_per_epoch


def train_batches(
    dataset: LogReader,
    config: DataConfig,
    *,
    steps: int,
    seed: int,
    start: int = 0,
    own: np.ndarray | None = None,
    ages: bool = False,
) -> grain.DatasetIterator[HostBatch]:
    """Batches of steps `start` to `steps` - 1. Close the iterator when done.

    Args:
      dataset: excluded features are dropped already.
      steps: length of the run; epochs follow one another, each in its own order.
      seed: of the order.
      start: the first step, which a resumed run goes on with.
      own: which samples of every batch this process gathers, `sharding.own_rows`; None: all.
      ages: batches hold `Batch.ages`.

    Raises:
      InputError: no full batch, a split or task that is not there, shorter chunk heads than the config's history.
    """
    order = _TrainOrder(_Windows(dataset, config, "train", train=True, ages=ages), seed)
    batches = grain.MapDataset.range(start, steps).map(
        lambda step: order.batch(int(step), own)
    )
    options = grain.ReadOptions(
        num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD
    )
    return iter(batches.to_iter_dataset(options))


def eval_batches(
    dataset: LogReader,
    config: DataConfig,
    split: str,
    *,
    limit: int = 0,
    own: np.ndarray | None = None,
    ages: bool = False,
) -> Iterator[tuple[HostBatch, ReadRows]]:
    """Yields every sample of the split once, window by window, by bucket, then by position; and who is read.

    The last batch of a bucket is filled up with samples of weight 0 and rows -1. `ReadRows` are those of the whole
    batch, whichever part of it this process gathers.

    Args:
      limit: above 0, only so many requests, whole ones (NIO), or streams (UC), evenly spread over the split.
      own, ages: as in `train_batches`.

    Raises:
      InputError: a split or task that is not there, shorter chunk heads than the config's history.
    """
    windows = _Windows(dataset, config, split, train=False, ages=ages)
    total = sum(span.requests for span in windows.spans)
    wanted = (
        np.arange(limit) * total // limit if 0 < limit < total else np.arange(total)
    )
    return _eval_batches(windows, wanted, config.eval_batch_size, own)


def _eval_batches(
    windows: _Windows, wanted: np.ndarray, size: int, own: np.ndarray | None
) -> Iterator[tuple[HostBatch, ReadRows]]:
    ends = np.cumsum([span.requests for span in windows.spans])
    for number, end in enumerate(ends):
        begin = end - windows.spans[number].requests
        requests = wanted[slice(*np.searchsorted(wanted, (begin, end)))] - begin
        if not requests.size:
            continue
        window = windows.load(number)
        chosen = np.flatnonzero(np.isin(np.cumsum(window.samples.opens) - 1, requests))
        for bucket, length in enumerate(windows.lengths):
            members = chosen[window.bucket[chosen] == bucket]
            for start in range(0, len(members), size):
                full = np.full(size, -1, np.int64)
                part = members[start : start + size]
                full[: len(part)] = part
                yield (
                    windows.gather(number, _part(full, own), length),
                    windows.identify(number, full, length),
                )


def _part(chosen: np.ndarray, own: np.ndarray | None) -> np.ndarray:
    return chosen if own is None else chosen[own]


@dataclasses.dataclass(frozen=True)
class _Span:
    """Chunks [start, stop) of a split; `first_row` counts the rows of the chunks before them."""

    start: int
    stop: int
    first_row: int
    samples: int
    requests: int


@dataclasses.dataclass(frozen=True)
class _Window:
    """A span in memory. `bucket: [N] int8`, index into the stream lengths of each sample."""

    log: InteractionLog
    samples: Samples
    bucket: np.ndarray


class _NewestTwo[K, V]:
    """The two results of `make` that were asked for last; a third is made only after the older one has gone.

    One thread makes, others wait: reads run ahead of each other by a few batches, which lie in two windows at most.
    """

    def __init__(self, make: Callable[[K], V]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._held: dict[K, V] = {}

    def get(self, key: K) -> V:
        with self._lock:
            if key in self._held:
                self._held[key] = self._held.pop(key)
            else:
                while len(self._held) > 1:
                    del self._held[next(iter(self._held))]
                self._held[key] = self._make(key)
            return self._held[key]


class _Windows:
    """The windows of a split, of which the newest two are held in memory. Safe to use from several threads."""

    def __init__(
        self,
        dataset: LogReader,
        config: DataConfig,
        split: str,
        *,
        train: bool,
        ages: bool = False,
    ) -> None:
        if split not in dataset.splits:
            raise InputError(
                f"the data set has no rows in split '{split}'{suggest(split, dataset.splits)}"
            )
        _check_heads(dataset.metadata, config)
        self.config, self.lengths, self.split = config, stream_lengths(config), split
        self._dataset, self._train, self._ages = dataset, train, ages
        self._catalogue = _contiguous(dataset.catalogue)
        self._context = (
            _context_columns(dataset.schema)
            if config.objective == "retrieval"
            else None
        )
        names = [task.name for task in dataset.schema.tasks]
        self._tasks = [names.index(name) for name in task_names(dataset.schema, config)]
        self._held = _NewestTwo(self._read)
        self.spans = self._plan()

    def load(self, number: int) -> _Window:
        return self._held.get((self.spans[number].start, self.spans[number].stop))

    def gather(self, number: int, chosen: np.ndarray, length: int) -> HostBatch:
        window = self.load(number)
        return gather(
            window.log,
            self._catalogue,
            window.samples,
            chosen,
            length=length,
            candidates=self.config.candidates,
            first_row=self.spans[number].first_row,
            context=self._context,
            ages=self._ages,
        )

    def identify(self, number: int, chosen: np.ndarray, length: int) -> ReadRows:
        """Who is read by samples of a window."""
        window, first_row = self.load(number), self.spans[number].first_row
        log, goals = window.log, self._context is not None
        rows = rows_read(
            window.samples,
            chosen,
            length=length,
            candidates=self.config.candidates,
            goals=goals,
        )
        read = rows[rows >= 0]
        chunk, item = np.searchsorted(log.start, read, side="right") - 1, log.item[read]
        rows = np.where(rows >= 0, rows + first_row, -1)
        return ReadRows(
            rows,
            log.user_id[chunk],
            self._catalogue.item_id[item],
            log.time[read],
            item,
            log.labels[read],
        )

    def _read(self, chunks: tuple[int, int]) -> _Window:
        log = self._dataset.load(self.split, *chunks)
        log = _contiguous(dataclasses.replace(log, labels=log.labels[:, self._tasks]))
        samples = cut_samples(log, self.config, train=self._train)
        longest = samples.length - isinstance(samples, Streams) * (
            self.config.objective == "retrieval"
        )
        return _Window(
            log, samples, np.searchsorted(self.lengths, longest).astype(np.int8)
        )

    def _plan(self) -> list[_Span]:
        """Cuts the split into windows of about equal size, and reads each once to count its samples."""
        ends = np.cumsum(self._dataset.chunk_lengths(self.split))
        count = -(-int(ends[-1]) // self.config.window_rows)
        inner = np.searchsorted(ends, np.arange(1, count) * ends[-1] / count) + 1
        edges = np.unique([0, *inner, len(ends)]).tolist()
        spans = []
        for start, stop in itertools.pairwise(edges):
            first_row = int(ends[start - 1]) if start else 0
            samples = self._held.get((start, stop)).samples
            spans.append(
                _Span(
                    start,
                    stop,
                    first_row,
                    len(samples.length),
                    int(samples.opens.sum()),
                )
            )
        return spans


def _contiguous[T: (InteractionLog, Catalogue)](arrays: T) -> T:
    """The arrays in C order, as `gather` needs them: leaving columns out, for one, gives another order."""
    held = {
        name: np.ascontiguousarray(array)
        for name, array in vars(arrays).items()
        if array is not None
    }
    return dataclasses.replace(arrays, **held)


def _context_columns(schema: Schema) -> ContextColumns:
    place = columns(schema.state)
    known = [f for f in schema.state if f.entity == "context"]
    ids, dense = np.zeros(place.ids_width, bool), np.zeros(place.dense_width, bool)
    for f in known:
        (ids if f.is_integer else dense)[
            slice(*(place.ids if f.is_integer else place.dense)[f.name])
        ] = True
    return ContextColumns(ids, dense)


def _check_heads(metadata: Metadata, config: DataConfig) -> None:
    """A chunk repeats the events before it; fewer of them than the history would cut histories short in silence."""
    head = metadata.options.get("overlap")
    # Retrieval is evaluated request by request, each with its own history, whatever it learns from.
    streams = config.paradigm == "uc" and config.objective == "ranking"
    field, needed = (
        ("overlap", config.overlap) if streams else ("events", config.events)
    )
    if head is not None and needed > head:
        raise InputError(
            f"data.{field}={needed} exceeds the {head} earlier events that the data set keeps at the head of a chunk; "
            f"use at most {head}, or prepare the data set again with an overlap of at least {needed}"
        )


class _TrainOrder:
    """Which samples make up the batch of a step."""

    def __init__(self, windows: _Windows, seed: int) -> None:
        size = windows.config.batch_size
        self._windows, self._size, self._seed = windows, size, seed % 2**64
        self._batches = np.array([span.samples // size for span in windows.spans])
        self.steps_per_epoch = int(self._batches.sum())
        self._held = _NewestTwo(self._deal)
        if not self.steps_per_epoch:
            most = max(span.samples for span in windows.spans)
            raise InputError(
                f"data.batch_size={size} is more than the {most} training samples of data.paradigm="
                f"'{windows.config.paradigm}' in a window of data.window_rows={windows.config.window_rows} rows; "
                "use a smaller batch_size, a larger window_rows, or tasks with more known labels"
            )

    def batch(self, step: int, own: np.ndarray | None) -> HostBatch:
        """The samples `own` of the batch of a step."""
        epoch, step = divmod(step, self.steps_per_epoch)
        visits = self._random(epoch, 0).permutation(len(self._batches))
        ends = np.cumsum(self._batches[visits])
        visit = int(np.searchsorted(ends, step, side="right"))
        number = int(visits[visit])
        buckets, chosen = self._held.get((epoch, number))
        at = step - int(ends[visit]) + len(buckets)
        return self._windows.gather(
            number, _part(chosen[at], own), self._windows.lengths[buckets[at]]
        )

    def _deal(self, visit: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Bucket `[n]` and samples `[n, batch_size]` of the n batches of an epoch in a window."""
        epoch, number = visit
        random, bucket = (
            self._random(epoch, number + 1),
            self._windows.load(number).bucket,
        )
        left, buckets, chosen = np.empty(0, np.int64), [], []
        for index in range(len(self._windows.lengths)):
            members = random.permutation(
                np.concatenate([left, np.flatnonzero(bucket == index)])
            )
            count = len(members) // self._size
            chosen.append(members[: count * self._size].reshape(count, self._size))
            buckets.append(np.full(count, index))
            left = members[count * self._size :]
        order = random.permutation(sum(len(part) for part in buckets))
        return np.concatenate(buckets)[order], np.concatenate(chosen)[order]

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(
            np.random.Philox(np.random.SeedSequence((self._seed, epoch, stream)))
        )
