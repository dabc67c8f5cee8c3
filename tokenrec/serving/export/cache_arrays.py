"""The prefix cache of a request as named arrays, which a server keeps between programs."""

from __future__ import annotations

from tokenrec.models.backbones.rope_attention import KeysValues
from tokenrec.models.backbones.tokenformer import PrefixCache
from tokenrec.serving.export.batches import Arrays

_PRESENT = "present"


def cache_to_arrays(cache: PrefixCache) -> Arrays:
    """Name the arrays of a cache, `[B, ...]` each."""
    arrays: Arrays = {}
    for layer, (keys, values) in enumerate(cache.layers):
        arrays |= {f"keys_{layer}": keys, f"values_{layer}": values}
    if cache.present is not None:
        arrays[_PRESENT] = cache.present
    return arrays


def cache_from_arrays(arrays: Arrays, layers: int) -> PrefixCache:
    """The cache of all layers, from arrays that hold others too."""
    keys_values = tuple(
        KeysValues(arrays[f"keys_{layer}"], arrays[f"values_{layer}"])
        for layer in range(layers)
    )
    return PrefixCache(keys_values, arrays.get(_PRESENT))
