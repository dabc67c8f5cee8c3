"""Decide which checkpoints of a run stay."""

from __future__ import annotations

from collections.abc import Iterable


def steps_to_delete(
    steps: Iterable[int], *, keep: int, keep_every: int, best_step: int
) -> list[int]:
    """Steps of the checkpoints that are not needed any more.

    Args:
      steps: steps of all complete checkpoints.
      keep: number of latest checkpoints that stay.
      keep_every: checkpoints at multiples of this step stay; 0 for none.
      best_step: step of the best evaluation, whose checkpoint stays; -1 for none.

    >>> steps_to_delete([1, 2, 3, 4, 5, 6], keep=2, keep_every=3, best_step=1)
    [2, 4]
    """
    ascending = sorted(steps)
    latest = ascending[-keep:] if keep else []
    return [
        step
        for step in ascending
        if step not in latest
        and step != best_step
        and not (keep_every and step % keep_every == 0)
    ]
