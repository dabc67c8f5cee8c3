"""Which tokens of a stream are words, and which only fill a text up to its length.

A text of a feature has a static length. TokenFormer reads what fills it up as tokens of
their own, as it does missing values; a language model has never seen any, so that they
are masked (`tokenrec.models.backbones.decoder`).

Letters: B batch, S stream length, C candidates, N tokens of an entity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.data.batch import Batch
from tokenrec.models.entity_makers import EntityMaker
from tokenrec.ops.layers import flatten_tokens
from tokenrec.sharding import RULES, on_mesh
from tokenrec.tokens.discrete_tokens import DiscreteTokenMaker
from tokenrec.tokens.embed import EntityFeatures
from tokenrec.tokens.history import merge_entities
from tokenrec.tokens.layout import Layout, Role

# Roles whose tokens may be words of a feature, and the parts of a batch that hold them.
_PARTS: dict[Role, tuple[str, ...]] = {
    "user": ("user",),
    "event": ("state", "action"),
    "query": ("target",),
    "title": ("target",),
    "target": ("target",),
}


def fills_up(makers: Iterable[EntityMaker | None]) -> bool:
    """Whether any of the makers has tokens that fill a text up."""
    return any(_fills_up(maker) for maker in makers)


def present_tokens(
    layout: Layout,
    makers: Mapping[Role, EntityMaker | None],
    entities: dict[str, EntityFeatures],
    batch: Batch,
    *,
    own: bool,
) -> jax.Array:
    """Which tokens left of `||`, or right of it, are no fill.

    Args:
      layout: layout of the stream.
      makers: maker of the tokens of each role.
      entities: features by part of the batch.
      batch: the batch.
      own: the tokens right of `||`.

    Returns:
      `[B, n] bool`.
    """
    wanted = np.flatnonzero((layout.candidate >= 0) == own)
    # One gather from the columns [real, tokens of a role, of the next role, ..].
    split = on_mesh(RULES("batch", None))
    columns = [jnp.ones((batch.valid.shape[0], 1), bool, out_sharding=split)]
    column, width = np.zeros(layout.length, int), 1
    for role, maker in makers.items():
        positions = np.intersect1d(layout.positions_of(role), wanted)
        if not len(positions) or not _fills_up(maker):
            continue
        assert isinstance(maker, DiscreteTokenMaker)
        _, ids = merge_entities(*(entities[part] for part in _PARTS[role]))
        if role == "query":
            # The candidates of a request share its context: take that of the first.
            ids = {name: value[:, :1] for name, value in ids.items()}
        present = flatten_tokens(maker.present(ids)[..., None])[..., 0]
        # A history may be cut from the left.
        columns.append(present[:, present.shape[1] - len(positions) :])
        column[positions] = width + np.arange(len(positions))
        width += len(positions)
    return jnp.concatenate(columns, axis=1)[:, column[wanted]]


def _fills_up(maker: EntityMaker | None) -> bool:
    return isinstance(maker, DiscreteTokenMaker) and maker.fills_up
