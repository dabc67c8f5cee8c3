"""The prefix cache of a request as named arrays, which a server keeps between programs."""

from __future__ import annotations

from tokenrec.models.backbones.rope_attention import KeysValues
from tokenrec.models.backbones.tokenformer import PrefixCache
from tokenrec.serving.export.batches import Arrays

_PRESENT = "present"


def kept_of(cache: PrefixCache) -> Arrays:
    """The arrays of a cache by name, `[B, ...]` each."""
    kept: Arrays = {}
    for layer, (keys, values) in enumerate(cache.layers):
        kept |= {f"keys_{layer}": keys, f"values_{layer}": values}
    if cache.present is not None:
        kept[_PRESENT] = cache.present
    return kept


def cache_of(kept: Arrays, layers: int) -> PrefixCache:
    """The cache of so many layers from its arrays, among others perhaps."""
    keys_values = tuple(
        KeysValues(kept[f"keys_{layer}"], kept[f"values_{layer}"])
        for layer in range(layers)
    )
    return PrefixCache(keys_values, kept.get(_PRESENT))
