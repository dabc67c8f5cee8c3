"""Attention and its gradients by definition, in float64 NumPy.

It shares with the implementations only the `Pattern` that says which tokens see which.
Equations: `tokenrec.ops.attention.softmax`. It runs on the CPU whatever the device is.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from benchmarks.attention_specs import AttentionSpec


class Result(NamedTuple):
    """Output and gradients of q, k and v, `[B, Q or K, H, h]`."""

    out: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def reference(spec: AttentionSpec, *inputs: np.ndarray) -> Result:
    """Compute attention and its gradients.

    Args:
      spec: the arguments; shapes and dtype are those of `inputs`.
      *inputs: q, k, v and the gradient of the output.
    """
    q, k, v, gradient = (np.asarray(x).astype(np.float64) for x in inputs)
    seen = spec.pattern.visible(spec.window)[None]
    if spec.valid is not None:
        seen = seen & spec.valid[:, None, :]
    # A token sees itself even when it is padding.
    seen = (seen | spec.pattern.diagonal())[:, None]
    scale = q.shape[-1] ** -0.5
    logits = np.where(seen, scale * np.einsum("bqhd,bkhd->bhqk", q, k), -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bhqk,bkhd->bqhd", weights, v)
    d_weights = np.einsum("bqhd,bkhd->bhqk", gradient, v)
    d_logits = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True))
    return Result(
        out,
        scale * np.einsum("bhqk,bkhd->bqhd", d_logits, k),
        scale * np.einsum("bhqk,bqhd->bkhd", d_logits, q),
        np.einsum("bhqk,bqhd->bkhd", weights, gradient),
    )


def without_padding(spec: AttentionSpec, gradient: np.ndarray) -> np.ndarray:
    """Set the gradient of the outputs of padding to 0, `[B, Q, H, h]`.

    These outputs are finite, and differ between implementations.
    """
    if spec.valid is None:
        return gradient
    places = np.searchsorted(spec.pattern.key_positions, spec.pattern.query_positions)
    return np.where(spec.valid[:, places, None, None], gradient, 0).astype(
        gradient.dtype
    )


def relative_error(
    result: np.ndarray, expected: np.ndarray, scale: float = 0.0
) -> float:
    """Compute `||result - expected|| / ||expected||`, in float64.

    Args:
      result: an array of any dtype.
      expected: the same in float64.
      scale: norm to divide by where `expected` is 0.
    """
    difference = np.asarray(result).astype(np.float64) - expected
    return float(np.linalg.norm(difference) / (np.linalg.norm(expected) or scale))


def errors(spec: AttentionSpec, result: Result, expected: Result) -> dict[str, float]:
    """Relative errors of the output and of each gradient; padding is left out."""
    got, wanted = (
        x._replace(out=without_padding(spec, np.asarray(x.out)))
        for x in (result, expected)
    )
    # With a window of one key, the gradients of q and k are 0.
    scale = float(np.linalg.norm(expected.dv))
    return {
        name: relative_error(getattr(got, name), getattr(wanted, name), scale)
        for name in Result._fields
    }


def some_queries(spec: AttentionSpec, count: int) -> tuple[AttentionSpec, np.ndarray]:
    """A spec of evenly spread queries, the first and the last among them.

    Returns:
      The spec, and the places of its queries among those of `spec`.
    """
    places = np.unique(np.linspace(0, spec.queries - 1, count).astype(int))
    positions = spec.pattern.query_positions[places]
    pattern = dataclasses.replace(spec.pattern, query_positions=positions)
    return spec.replace(pattern=pattern), places
