"""Frozen histories: evaluate as if a user's newest events were not known yet.

In a live evaluation the history of an impression holds the user's events up to it, the
earlier impressions of the evaluated days among them. That is right for a system which
learns of them at once, and it makes GAUC hard to read: of a user with three impressions
and one positive, an earlier positive makes the later ones likelier to be negative, so
that a model which follows the user's mood ranks the user's own impressions worse. With
histories that end at one time for all impressions of a user, GAUC compares items alone.

What is frozen: histories, the past that the baselines count, and declared statistics of
the past (tokenrec/data/past), of which the data set keeps those of the start of valid
and test. Another time is refused where it has such statistics. What is not: the other
features of the log rows, a source's own counts of the past among them.
"""

from __future__ import annotations

from typing import Any

from tokenrec.config import Config
from tokenrec.data.dataset import Dataset
from tokenrec.data.frozen_rows import check_frozen_time
from tokenrec.data.id_counts import load_parts
from tokenrec.data.interaction_log import SCORED
from tokenrec.data.sources.delimited_times import split_time
from tokenrec.errors import InputError

# The value of `--freeze-at` that stands for the first scored row of the split.
SPLIT_START = "split"


def check_freeze(config: Config, limit: int) -> None:
    """Check that histories can be frozen in the evaluation of a run.

    Args:
      config: of the run.
      limit: samples of the evaluation; 0 is all.

    Raises:
      InputError: they cannot.
    """
    if config.data.objective == "retrieval":
        raise InputError(
            "--freeze-at with data.objective='retrieval': AUC and GAUC of frozen "
            "histories are those of ranking; leave it out"
        )
    if limit and config.data.paradigm == "uc":
        # A sample is a stream of several impressions live, and of one when frozen.
        raise InputError(
            f"--samples={limit} with --freeze-at and data.paradigm='uc': the samples "
            "would hold other impressions than those of the live evaluation; use "
            "--samples=0"
        )


def freeze_time(dataset: Dataset, split: str, text: str) -> int:
    """Find the time at which histories end, in milliseconds.

    Args:
      dataset: the prepared data set.
      split: split that is evaluated.
      text: an ISO date or time (UTC unless it names a zone), milliseconds since 1970,
        or "split", the time of the first scored row of the split.

    Raises:
      InputError: it is none of these, no scored row is as late, or the data set has
        statistics of the past that cannot be frozen then.
    """
    first, last = None, None
    for log in load_parts(dataset, split):
        times = log.time[(log.flags & SCORED) != 0]
        if len(times):
            first = min(int(times.min()), int(times.min()) if first is None else first)
            last = max(int(times.max()), int(times.max()) if last is None else last)
    if first is None or last is None:
        raise InputError(f"--freeze-at={text}: split '{split}' has no scored row")
    time = first if text == SPLIT_START else split_time("--freeze-at", text, "UTC")
    if time > last:
        raise InputError(
            f"--freeze-at={text} is {time} ms, later than every scored row of split "
            f"'{split}', which are from {first} to {last} ms: nothing would be frozen; "
            f"use an earlier time, or {SPLIT_START}"
        )
    check_frozen_time(dataset.metadata, dataset.schema, split, time, text)
    return time


def add_frozen(live: dict[str, Any], frozen: dict[str, Any], time: int) -> None:
    """Put the report of frozen histories beside the live one, baselines too.

    Args:
      live: report of a ranking run, perhaps with "baselines"; it gets `"frozen"`.
      frozen: the same with frozen histories.
      time: milliseconds at which they end.
    """
    reports = frozen.pop("baselines", {})
    live["frozen"] = {"history_ends_ms": time} | frozen
    for name, report in reports.items():
        live["baselines"][name]["frozen"] = {"history_ends_ms": time} | report
