"""Load a split in windows: runs of whole chunks that are held in memory together.

A window has about `data.window_rows` log rows. It bounds the memory of the pipeline,
and it is the range within which training samples are shuffled. A split with fewer log
rows is a single window and stays in memory.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from tokenrec.config import DataConfig
from tokenrec.data.batch import HostBatch, ReadRows
from tokenrec.data.batch_shapes import stream_lengths, target_columns, task_names
from tokenrec.data.frozen_heads import check_frozen_heads
from tokenrec.data.gather import ContextColumns, gather, rows_read
from tokenrec.data.id_counts import RareIds, map_rare_items, map_rare_rows
from tokenrec.data.interaction_log import Catalogue, InteractionLog
from tokenrec.data.metadata import Metadata
from tokenrec.data.row_marks import log_of_marks
from tokenrec.data.samples import Samples, cut_samples
from tokenrec.data.schema import Schema, columns
from tokenrec.data.two_slot_cache import TwoSlotCache
from tokenrec.data.uc_samples import Streams
from tokenrec.errors import InputError, suggest

type OnProgress = Callable[[str], None]

_BLOCK_ROWS = 1 << 18


class LogReader(Protocol):
    """A prepared data set as the pipeline reads it, such as `open_dataset` returns."""

    @property
    def metadata(self) -> Metadata: ...

    @property
    def schema(self) -> Schema: ...

    @property
    def catalogue(self) -> Catalogue: ...

    @property
    def splits(self) -> Sequence[str]: ...

    @property
    def rare_ids(self) -> RareIds:
        """By which ids batches replace those of a table; empty for none."""
        ...

    def chunk_lengths(self, split: str) -> np.ndarray:
        """Log rows of each chunk of a split: `[chunks] int64`."""
        ...

    def row_marks(self, split: str) -> np.ndarray | None:
        """Marks of the log rows of a split, with which its samples can be counted.

        Returns:
          `[R]` of `row_marks.marks_dtype`; None if there are none.
        """
        ...

    def check_shards(self, split: str) -> None:
        """Check that `load` will find the chunks of a split, without reading them.

        Raises:
          InputError: a file is missing or of another data set.
        """
        ...

    def load(
        self,
        split: str,
        start: int = 0,
        stop: int | None = None,
        *,
        frozen: bool = False,
    ) -> InteractionLog:
        """Read chunks of a split.

        Args:
          split: name of the split.
          start: first chunk.
          stop: chunk after the last one; None: all chunks to the end.
          frozen: scored rows have statistics as of the start of the split.
        """
        ...


@dataclasses.dataclass(frozen=True)
class WindowPlan:
    """A window that need not be in memory.

    Attributes:
      start: first chunk of the split.
      stop: chunk after the last one.
      first_row: log rows of the split before the window.
      samples: number of samples.
      requests: number of requests (NIO) or of streams (UC).
    """

    start: int
    stop: int
    first_row: int
    samples: int
    requests: int


@dataclasses.dataclass(frozen=True)
class Window:
    """A window in memory. N samples.

    Attributes:
      log: its log rows, with the labels of the configured tasks only.
      samples: what they were cut into.
      bucket: `[N] int8`, index into `Windows.lengths` of each sample's stream length.
    """

    log: InteractionLog
    samples: Samples
    bucket: np.ndarray


class Windows:
    """The windows of a split, the two most recent ones in memory. Thread-safe.

    Args:
      dataset: the prepared data set, without the excluded features.
      config: `data` of the run's config.
      split: name of the split.
      train: cut samples for training rather than for evaluation.
      ages: batches hold `Batch.ages`.
      freeze_at: milliseconds; histories end before this time (samples.py).
      on_progress: called with a description of what is planned next, many times if the
        split is large; what it raises ends the planning.

    Attributes:
      config: as given.
      split: as given.
      lengths: stream lengths, shortest first.
      plans: the windows, in the order of the split.

    Raises:
      InputError: the data set has no such split or task, or its chunks repeat fewer
        events than a history needs.
    """

    def __init__(
        self,
        dataset: LogReader,
        config: DataConfig,
        split: str,
        *,
        train: bool,
        ages: bool = False,
        freeze_at: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        if split not in dataset.splits:
            known = suggest(split, dataset.splits)
            raise InputError(f"the data set has no rows in split '{split}'{known}")
        _check_chunk_heads(dataset.metadata, config)
        self.config = config
        self.split = split
        self.lengths = stream_lengths(config)
        self._dataset = dataset
        self._train = train
        self._ages = ages
        self._freeze_at = freeze_at
        self._rare = dataset.rare_ids
        catalogue = map_rare_items(dataset.catalogue, dataset.schema, self._rare)
        self._catalogue = _contiguous(catalogue)
        self._context = (
            _context_columns(dataset.schema)
            if config.objective == "retrieval"
            else None
        )
        # Columns of the labels, in the order of the config.
        names = [task.name for task in dataset.schema.tasks]
        chosen = task_names(dataset.schema, config)
        self._tasks = [names.index(name) for name in chosen]
        self._targets = target_columns(dataset.schema, chosen)
        self._cache = TwoSlotCache(self._read)
        self.plans = self._plan(on_progress)

    def load(self, number: int) -> Window:
        """Return a window, read from disk unless it is in memory.

        Raises:
          InputError: its log rows are damaged, or not those that were planned with.
        """
        plan = self.plans[number]
        window = self._cache.get((plan.start, plan.stop))
        samples = len(window.samples.length)
        if samples != plan.samples:
            raise InputError(
                f"data: chunks {plan.start} to {plan.stop - 1} of split '{self.split}' "
                f"have {samples} samples, and {plan.samples} by the marks of their "
                "rows; files of two data sets were mixed: prepare the data set again"
            )
        return window

    def gather(self, number: int, chosen: np.ndarray, length: int) -> HostBatch:
        """Gather samples of a window into a batch.

        Args:
          number: index of the window.
          chosen: `[B] int64`, samples of the window; -1 makes a padding sample.
          length: T, positions of a history or stream.
        """
        window = self.load(number)
        return gather(
            window.log,
            self._catalogue,
            window.samples,
            chosen,
            length=length,
            candidates=self.config.candidates,
            first_row=self.plans[number].first_row,
            context=self._context,
            ages=self._ages,
            unscored_weight=self.config.unscored_weight,
            row_weights=self._train,
        )

    def identify(self, number: int, chosen: np.ndarray, length: int) -> ReadRows:
        """Look up the identities of the log rows that samples of a window read.

        Args:
          number: index of the window.
          chosen: `[B] int64`, samples of the window; -1 is a padding sample.
          length: T, positions of a history or stream.
        """
        window = self.load(number)
        log = window.log
        rows = rows_read(
            window.samples,
            chosen,
            length=length,
            candidates=self.config.candidates,
            goals=self._context is not None,
        )
        # The chunk of a log row is the last one that begins at or before it.
        read = rows[rows >= 0]
        chunk = np.searchsorted(log.start, read, side="right") - 1
        item = log.item[read]
        return ReadRows(
            rows=np.where(rows >= 0, rows + self.plans[number].first_row, -1),
            user_id=log.user_id[chunk],
            item_id=self._catalogue.item_id[item],
            time=log.time[read],
            item=item,
            labels=log.labels[read],
            request=log.request[read],
            targets=None if log.targets is None else log.targets[read],
        )

    def _read(self, chunks: tuple[int, int]) -> Window:
        frozen = self._freeze_at is not None
        log = self._dataset.load(self.split, *chunks, frozen=frozen)
        log = map_rare_rows(log, self._dataset.schema, self._rare)
        targets = log.targets
        if targets is not None:
            # A run without a task of numbers has none.
            targets = targets[:, self._targets] if self._targets else None
        log = _contiguous(
            dataclasses.replace(log, labels=log.labels[:, self._tasks], targets=targets)
        )
        if self._freeze_at is not None:
            head = self._dataset.metadata.options.get("overlap")
            check_frozen_heads(log, self._freeze_at, self.config.events, head)
        samples = cut_samples(
            log, self.config, train=self._train, freeze_at=self._freeze_at
        )
        # Streams of retrieval hold one event more than the model sees (samples.py).
        retrieval = self.config.objective == "retrieval"
        goal_only = int(isinstance(samples, Streams) and retrieval)
        seen = samples.length - goal_only
        # The shortest stream length that holds the sample.
        bucket = np.searchsorted(self.lengths, seen).astype(np.int8)
        return Window(log, samples, bucket)

    def _plan(self, on_progress: OnProgress | None) -> list[WindowPlan]:
        """Cut the split into windows of about equal size, and count their samples.

        How many samples a window has depends on the config, and the order of batches
        cannot be known without it.
        """
        lengths = self._dataset.chunk_lengths(self.split)
        self._dataset.check_shards(self.split)
        start_of_chunk = np.concatenate([[0], np.cumsum(lengths)])
        edges = _cut_evenly(lengths, self.config.window_rows)
        # Marks say which log rows share a time, and not when that was.
        marks = None
        if self._freeze_at is None:
            marks = self._dataset.row_marks(self.split)
        plans = []
        for number, (start, stop) in enumerate(itertools.pairwise(edges), 1):

            def report(number: int = number) -> None:
                if on_progress is not None:
                    on_progress(
                        f"planning the split '{self.split}': window {number} of "
                        f"{len(edges) - 1}"
                    )

            report()
            if marks is None:
                # A data set from before there were marks, or frozen histories: the log
                # rows are read.
                counts = _count(self._cache.get((start, stop)).samples)
            else:
                counts = self._count_by_marks(
                    marks, start_of_chunk[start : stop + 1], report
                )
            plans.append(WindowPlan(start, stop, int(start_of_chunk[start]), *counts))
        return plans

    def _count_by_marks(
        self, marks: np.ndarray, start: np.ndarray, report: Callable[[], None]
    ) -> tuple[int, int]:
        """Count the samples and the requests of a window without its log rows.

        Args:
          marks: those of the split.
          start: `[U + 1] int64`, first log row of each chunk of the window, counted in
            the split.
          report: called before each block but the first.
        """
        samples = requests = 0
        # Blocks of chunks that fit in the cache of a core: three times as fast.
        blocks = _cut_evenly(np.diff(start), _BLOCK_ROWS)
        for begin, end in itertools.pairwise(blocks):
            if begin:
                report()
            first, last = start[[begin, end]]
            log = log_of_marks(
                marks[first:last], start[begin : end + 1] - first, self._tasks
            )
            counts = _count(cut_samples(log, self.config, train=self._train))
            samples += counts[0]
            requests += counts[1]
        return samples, requests


def _cut_evenly(lengths: np.ndarray, rows: int) -> list[int]:
    """Cut chunks into parts of about equal size.

    Args:
      lengths: `[U] int64`, log rows of each chunk.
      rows: about the most log rows of a part.

    Returns:
      The chunks at which parts begin, and U.
    """
    ends = np.cumsum(lengths)
    # The number of parts, rounded up.
    count = -(-int(ends[-1]) // rows)
    # Cut after the chunk that reaches each n-th share of the log rows. A chunk larger
    # than a share makes two cuts fall together, and `unique` joins them.
    inner = np.searchsorted(ends, np.arange(1, count) * ends[-1] / count) + 1
    return np.unique([0, *inner, len(ends)]).tolist()


def _count(samples: Samples) -> tuple[int, int]:
    """Number of samples, and of requests (NIO) or streams (UC)."""
    return len(samples.length), int(samples.opens.sum())


def _contiguous[T: (InteractionLog, Catalogue)](arrays: T) -> T:
    """Copy arrays into C order, which `gather` needs, unless they are in it.

    Leaving columns out, for one, gives an array of another order.
    """
    copies = {
        name: np.ascontiguousarray(array)
        for name, array in vars(arrays).items()
        if isinstance(array, np.ndarray)
    }
    return dataclasses.replace(arrays, **copies)  # type: ignore[arg-type]


def _context_columns(schema: Schema) -> ContextColumns:
    """Mark the columns of `Schema.state` that hold context features."""
    place = columns(schema.state)
    ids = np.zeros(place.ids_width, bool)
    dense = np.zeros(place.dense_width, bool)
    for feature in schema.state:
        if feature.entity == "context":
            if feature.is_integer:
                ids[slice(*place.ids[feature.name])] = True
            else:
                dense[slice(*place.dense[feature.name])] = True
    return ContextColumns(ids, dense)


def _check_chunk_heads(metadata: Metadata, config: DataConfig) -> None:
    """Check that chunks repeat enough earlier events for the histories of the config.

    With too few of them, histories at the head of a chunk would silently be short.
    """
    # A source in memory, as in tests, may have no chunk heads.
    head = metadata.options.get("overlap")
    # Retrieval is evaluated request by request, each with a history of its own,
    # whatever the paradigm of training.
    streams = config.paradigm == "uc" and config.objective == "ranking"
    field, needed = (
        ("overlap", config.overlap) if streams else ("events", config.events)
    )
    if head is not None and needed > head:
        raise InputError(
            f"data.{field}={needed} exceeds the {head} earlier events that the data "
            f"set keeps at the head of a chunk; use at most {head}, or prepare the "
            f"data set again with an overlap of at least {needed}"
        )
