"""Which software made something."""

from __future__ import annotations

from importlib import metadata

PACKAGES = (
    "tokenrec",
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "pyarrow",
)


def versions() -> dict[str, str]:
    """Version of each package, or "not installed", as tokenrec itself is where it runs from a folder."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
