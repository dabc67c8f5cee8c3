"""Check that the mesh divides the sizes of a model."""

from __future__ import annotations

from jax.sharding import Mesh

from tokenrec.config import ModelConfig
from tokenrec.errors import InputError
from tokenrec.models.backbones.block import ffn_width


def sharded_sizes(config: ModelConfig) -> tuple[tuple[str, int, str], ...]:
    """Sizes that the mesh splits: field, size, and the axis that must divide it."""
    # Logical axes "embed", "heads" and "ffn" of `tokenrec.sharding.Rules`.
    return (
        ("model.width", config.width, "fsdp"),
        ("model.heads", config.heads, "tensor"),
        ("model.ffn_width", ffn_width(config), "tensor"),
    )


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Check that each mesh axis divides the sizes that it splits.

    Raises:
      InputError: an axis does not divide its size.
    """
    for field, size, axis in sharded_sizes(config):
        if size % mesh.shape[axis]:
            raise InputError(
                f"{field}={size} does not split over mesh.{axis}={mesh.shape[axis]}; "
                f"use an axis that divides it, or another {field}"
            )
