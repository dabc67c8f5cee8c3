"""Id dropout: in training, known ids become *unknown* with some probability.

    id <- UNKNOWN  with probability q,  if id is a known value      `tokens.id_dropout`

It does two things. The row of *unknown*, which no id of the training split reads and
which would keep its random start, learns what is common to all values. And a model
cannot rely on the row of one id alone, which makes it memorise less when it sees the
same log rows again.

Every occurrence is drawn by itself, from a PRNG key of its sample, so that the draws do
not depend on how a batch is split. Missing values stay missing. Evaluation drops
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.config import TokensConfig
from tokenrec.data.batch import Batch
from tokenrec.data.schema import (
    FIRST_KNOWN,
    UNKNOWN,
    VALUE_KINDS,
    Feature,
    Schema,
    columns,
)
from tokenrec.errors import InputError, suggest
from tokenrec.ops.layers import split_keys

# Probabilities are rounded to multiples of this, the share of one 16-bit number.
_NUMBERS = 1 << 16


def names_of_value_tables(features: Iterable[Feature]) -> set[str]:
    """Names of the tables whose ids are values of categorical features."""
    return {f.table_name for f in features if f.kind in VALUE_KINDS}


def check_table_names(schema: Schema, config: TokensConfig) -> None:
    """Check the tables that options of ids name.

    Raises:
      InputError: the data set has no such table, or its ids are not those of values.
    """
    known = names_of_value_tables(schema.features)
    for field in ("id_dropouts", "min_counts"):
        for name in getattr(config, field):
            if name not in known:
                raise InputError(
                    f"tokens.{field} names the table '{name}', which is none of "
                    f"categorical or multi-valued features{suggest(name, known)}"
                )


def _rates(features: tuple[Feature, ...], config: TokensConfig) -> np.ndarray:
    """Probability of each column of the packed `ids` of a part, `[I] float64`."""
    packed = columns(features)
    rates = np.zeros(packed.ids_width)
    for f in features:
        if f.kind in VALUE_KINDS:
            rate = config.id_dropouts.get(f.table_name, config.id_dropout)
            rates[slice(*packed.ids[f.name])] = rate
    return rates


def drop_ids(
    batch: Batch,
    parts: dict[str, tuple[Feature, ...]],
    config: TokensConfig,
    keys: jax.Array,
) -> Batch:
    """Replace ids of a training batch by *unknown*.

    Args:
      batch: the batch.
      parts: "user", "state", "action" and "target" -> its features, in the order of
        its columns.
      config: `tokens` of the run's config.
      keys: `[B]`, PRNG keys.

    Returns:
      The batch; the same object if nothing is to be dropped.
    """
    if not config.id_dropout and not any(config.id_dropouts.values()):
        return batch
    names = ("user", "state", "action", "target")
    for name, part_keys in zip(names, split_keys(keys, len(names)), strict=True):
        signals = getattr(batch, name)
        # Rounded to whole numbers of 65,536.
        below = np.round(_rates(parts[name], config) * _NUMBERS).astype(np.uint32)
        if signals is None or not below.any():
            continue
        shape = signals.ids.shape[1:]
        bits = jax.vmap(
            lambda key, shape=shape: jax.random.bits(key, shape, jnp.uint16)
        )(part_keys)
        dropped = (bits < below) & (signals.ids >= FIRST_KNOWN)
        ids = jnp.where(dropped, jnp.int32(UNKNOWN), signals.ids)
        batch = batch._replace(**{name: signals._replace(ids=ids)})
    return batch
