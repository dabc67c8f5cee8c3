"""Nested config values by dotted field name."""

from __future__ import annotations

from collections.abc import Mapping


def flatten_fields(value: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Flatten nested mappings to one mapping by dotted name.

    >>> flatten_fields({"seed": 0, "model": {"width": 64}})
    {'seed': 0, 'model.width': 64}
    """
    flat: dict[str, object] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= flatten_fields(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat
