"""Attention mass: the share of attention on each part of a stream.

The mass of a layer sums its attention `A: [B, H, S, S]` over groups of keys (static
tokens, events by distance, the target) and takes the mean over the queries of one kind
(docs/methods.md section 5):

    mass(group) = mean over queries i of  sum_{j in group(i)} A[b, h, i, j]        [H]

B streams, S positions of a stream, H heads.
"""

from __future__ import annotations

import itertools

import numpy as np

from tokenrec.tokens.layout import ROLES, Layout

EVENT_ROLES = ("state", "action", "event")
# Lower ends of the distance bands, in events: band 4 holds the distances 4 to 7. The
# distance of an event to itself is 0, to the one before it 1.
DISTANCES = (0, 1, 2, 4, 8, 16, 32, 64)
LATER = "later events"


def attention_mass(
    weights: np.ndarray, layout: Layout, valid: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """Sum the attention of one layer over groups of keys, and average over queries.

    The groups of queries are the roles of the layout; states, actions and fused events
    are the one group "event". The groups of keys are the roles too, but events are
    grouped by their distance in events ("event 4-7"). For a query in the history the
    distance is counted from its own event, for others from the end of the history, so
    that the newest event has the distance 1. In a bidirectional prefix, keys after the
    query's event are "later events".

    Args:
      weights: `[B, H, S, S]`, queries by keys.
      layout: roles and order of the S positions.
      valid: `[B, S] bool`, False for padding, which is left out as a query.

    Returns:
      Group of queries -> group of keys -> `[H]`; the keys of a group of queries sum to
      1. A group without any valid query is left out.
    """
    roles = _role_groups(layout)
    names, group = _key_groups(layout, roles)
    # [B, H, S, groups]: for each query the mass on each group of keys.
    mass = np.stack(
        [
            np.where(group == number, weights, 0).sum(axis=-1)
            for number in range(len(names))
        ],
        axis=-1,
    )
    by_query = {}
    for role in dict.fromkeys(roles.tolist()):
        queries = valid & (roles == role)
        if queries.any():
            mean = mass.transpose(0, 2, 1, 3)[queries].mean(axis=0)
            by_query[role] = {
                name: mean[:, number] for number, name in enumerate(names)
            }
    return by_query


def _role_groups(layout: Layout) -> np.ndarray:
    """Name the group of each position: `[S]`, its role, or "event"."""
    names = [
        "event" if ROLES[role] in EVENT_ROLES else ROLES[role] for role in layout.roles
    ]
    return np.array(names)


def _key_groups(layout: Layout, roles: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Group the keys of each query.

    Args:
      layout: roles and order of the S positions.
      roles: `[S]`, groups of `_role_groups`.

    Returns:
      Names of the groups that occur, and `[S, S]`, the number of the group of each key
      for each query.
    """
    is_event = roles == "event"
    # 1. A time for each position, in events. Positions outside of the history come
    # after its end, except that a code follows the event that it continues.
    after_history = np.where(layout.event >= 0, layout.event + 1, layout.events)
    time = np.where(is_event, layout.event, after_history)
    distance = time[:, None] - time[None, :]

    # 2. Names of all groups: the roles other than events, then the bands of distances.
    bands = [
        f"event {first}" if last == first + 1 else f"event {first}-{last - 1}"
        for first, last in itertools.pairwise(DISTANCES)
    ]
    bands += [f"event {DISTANCES[-1]}-"]
    names = [*dict.fromkeys(roles[~is_event].tolist()), *bands, LATER]

    # 3. The band of each pair. Later events are hidden unless a prefix is
    # bidirectional; their attention is 0 then, and any band serves.
    first_band = names.index(bands[0])
    band = first_band + np.searchsorted(DISTANCES, distance, side="right") - 1
    of_later = names.index(LATER) if layout.prefix else first_band
    band = np.where(distance < 0, of_later, band)

    # 4. Keys that are no events belong to the group of their role.
    role_number = np.array(
        [
            0 if event else names.index(role)
            for role, event in zip(roles, is_event, strict=True)
        ]
    )
    numbers = np.where(is_event[None, :], band, role_number[None, :])

    # 5. Drop the groups that do not occur.
    used = np.unique(numbers)
    return [names[number] for number in used], np.searchsorted(used, numbers)
