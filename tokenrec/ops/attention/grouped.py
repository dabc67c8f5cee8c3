"""Grouped-query attention: keys and values of fewer heads than queries.

Head n of the H heads of queries reads head `n // (H / G)` of the G heads of keys and
values (Ainslie et al., *GQA*, arXiv 2305.13245, 2023). The projections and the cache
have G heads; the kernels read H.

Letters: B streams, K keys, G heads of keys and values, H heads of queries, h width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokenrec.sharding import RULES, on_mesh, reshard, tokens_of


def head_axis(heads: int) -> str | None:
    """Logical axis of so many heads of keys and values on the mesh in use.

    None where `mesh.tensor` does not divide their number: every device has them all.
    """
    devices = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    return None if heads % devices else "heads"


def repeat_heads(x: jax.Array, heads: int) -> jax.Array:
    """Repeat the heads of keys or values, `[B, K, G, h]` to `[B, K, H, h]`."""
    batch, length, groups, width = x.shape
    if groups == heads:
        return x
    shape = (batch, length, groups, heads // groups, width)
    tokens = tokens_of(x)
    spec = RULES("batch", tokens, head_axis(groups), None, None)
    wide = jnp.broadcast_to(x[:, :, :, None], shape, out_sharding=on_mesh(spec))
    # Heads that every device has are cut here: nothing is exchanged.
    spec = RULES("batch", tokens, head_axis(groups), None)
    whole = jnp.reshape(wide, (batch, length, heads, width), out_sharding=on_mesh(spec))
    return reshard(whole, RULES("batch", tokens, "heads", None))
