"""Load exported programs, and tell which platform runs them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
from jax import export

from tokenrec.errors import InputError
from tokenrec.serving.artifact import Artifact

# Platform of a program -> name of its devices in JAX.
BACKENDS = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}


def program_platform(device: jax.Device) -> str:
    """Name of a device's platform among those that programs are exported for."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version else "cuda"


def check_flatbuffers() -> None:
    """Check that JAX can read and write programs.

    Raises:
      InputError: the package that it needs is not installed.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise InputError(
            "exported programs are read and written with the package flatbuffers, which "
            "is not installed; run `pip install flatbuffers`"
        )


def load_program(artifact: Artifact, name: str) -> Callable[..., Any]:
    """Load a program, jitted.

    Raises:
      InputError: this version of JAX cannot read it, or a package is missing.
    """
    check_flatbuffers()
    try:
        exported = export.deserialize(bytearray(artifact.read_bytes(name)))
    # What JAX raises for a program of a version that it cannot read is not documented.
    except Exception as error:
        raise InputError(
            f"artifact '{artifact.path / name}' cannot be read by JAX "
            f"{jax.__version__}: {error}; it was exported by JAX "
            f"{artifact.manifest['versions'].get('jax')}: export the run again"
        ) from error
    return jax.jit(exported.call)
