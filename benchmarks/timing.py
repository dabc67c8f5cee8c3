"""Take time in turns, so that load on the machine falls on all variants alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

# Turns before those that count.
WARM = 3

# A variant: a call whose result is waited for.
Run = Callable[[], Any]


def take_turns[K: Hashable](
    runs: Mapping[K, Run], repeats: int, *, pause: float = 0.0
) -> dict[K, list[float]]:
    """Time every run `repeats` times, after a warm-up.

    Args:
      runs: name -> run.
      repeats: turns that count.
      pause: seconds of sleep before each run, for threads of another library that spin
        for a while after their work.

    Returns:
      Name -> seconds of each turn.
    """
    seconds: dict[K, list[float]] = {name: [] for name in runs}
    names = list(runs)
    random = np.random.default_rng(0)
    for turn in range(WARM + repeats):
        # A new order each turn: a run is slower after one that emptied the caches or
        # returned much memory.
        for number in random.permutation(len(names)):
            if pause:
                time.sleep(pause)
            begin = time.perf_counter()
            jax.block_until_ready(runs[names[number]]())
            if turn >= WARM:
                seconds[names[number]].append(time.perf_counter() - begin)
    return seconds


def paired_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median over the turns of the ratio inside a turn; what slows a turn cancels."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))
