"""Select positions of a stream whose tokens are split over the mesh axis `context`.

Between the embedding and the read-outs of a backbone, `[B, n, d]` lies in contiguous
parts of n / P tokens. Layers select fewer positions on the way up (`bfts.py`), and these
lie on other devices: each of the four cases of split or whole, before and after, takes
the exchange that moves the least.

Letters: B batch, n and m positions, P devices along `context`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.sharding import RULES, reshard, tokens_of
from tokenrec.tokens.layout import select_positions

_AXIS = "context"


def context_parts() -> int:
    """Number of devices that tokens are split over; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(_AXIS, 1)


def select_split(
    x: jax.Array, positions: np.ndarray, among: np.ndarray, *, split: bool
) -> jax.Array:
    """Select stream positions of an array whose tokens may be split.

    Args:
      x: `[B, n, d]`, an entry for each position of `among`.
      positions: `[m]`, positions to select, all in `among`, ascending.
      among: `[n]`, positions that `x` holds, ascending.
      split: whether the tokens of the result are split; then P divides m.

    Returns:
      `[B, m, d]`.
    """
    if tokens_of(x) is None:
        selected = select_positions(x, positions, among)
        return reshard(selected, RULES("batch", "tokens", None)) if split else selected
    if split and len(positions) == len(among):
        return x
    entries = np.searchsorted(among, positions)
    if split:
        return _take_from_all(x, entries)
    # A sum over devices moves 2 m tokens, a gather n.
    if 2 * len(positions) < len(among):
        return _sum_of_owned(x, entries)
    whole = reshard(x, RULES("batch", None, None))
    return select_positions(whole, positions, among)


def _take_from_all(x: jax.Array, entries: np.ndarray) -> jax.Array:
    """Gather all tokens, and take those of each part: `[B, n, d]` to `[B, m, d]`."""
    by_token = RULES("batch", "tokens", None)

    def local(x: jax.Array, entries: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x, _AXIS, axis=1, tiled=True)[:, entries]

    return jax.shard_map(
        local, in_specs=(by_token, RULES("tokens")), out_specs=by_token
    )(x, reshard(jnp.asarray(entries), RULES("tokens")))


def _sum_of_owned(x: jax.Array, entries: np.ndarray) -> jax.Array:
    """Take tokens from the devices that own them: `[B, n, d]` to `[B, m, d]`."""

    def local(x: jax.Array) -> jax.Array:
        place = jnp.asarray(entries) - jax.lax.axis_index(_AXIS) * x.shape[1]
        owned = (place >= 0) & (place < x.shape[1])
        taken = x[:, jnp.clip(place, 0, x.shape[1] - 1)]
        # One device adds the token, the others zeros: exact in any dtype.
        return jax.lax.psum(jnp.where(owned[:, None], taken, 0), _AXIS)

    return jax.shard_map(
        local,
        in_specs=RULES("batch", "tokens", None),
        out_specs=RULES("batch", None, None),
    )(x)
