"""Names of TPU chips: JAX has two for some, by the version of libtpu."""

from __future__ import annotations

_OTHER_NAMES = {
    "TPU v5e": "TPU v5 lite",
    "TPU v5p": "TPU v5",
    "TPU v6e": "TPU v6 lite",
}


def canonical_kind(device_kind: str) -> str:
    """Choose one name of a `jax.Device.device_kind` that has two.

    >>> canonical_kind("TPU v5p"), canonical_kind("TPU v5")
    ('TPU v5', 'TPU v5')
    """
    return _OTHER_NAMES.get(device_kind, device_kind)
