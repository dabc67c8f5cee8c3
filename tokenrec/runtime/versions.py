"""Versions of the packages that a result depends on."""

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
    """Return the version of each package.

    A package that is not installed has "not installed"; so has tokenrec itself if it
    runs from a folder.
    """
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
