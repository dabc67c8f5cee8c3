"""Attention and its gradients by definition, in float64 NumPy.

It shares with the implementations only the `Pattern` that says which tokens see which.
Equations: `tokenrec.ops.attention.softmax`. It runs on the CPU whatever the device is.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

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


def draw_inputs(spec: AttentionSpec) -> tuple[np.ndarray, ...]:
    """Draw q, k, v and the gradient of the output, rounded to the dtype of the spec.

    The gradient is 0 at outputs of padding.
    """
    random = np.random.default_rng(0)
    drawn = [
        random.standard_normal(array.shape, np.float32).astype(array.dtype)
        for array in spec.arrays()
    ]
    return (*drawn[:3], without_padding(spec, drawn[3]))


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


class Sample:
    """The reference at a few queries of one stream and two heads.

    The output and the gradient of a query need no other query, so that long streams
    can be checked.

    Args:
      spec: the arguments of the whole.
      inputs: q, k, v and the gradient of the output, `[B, Q or K, H, h]`.
      queries: evenly spread, the first and the last among them.
    """

    def __init__(
        self, spec: AttentionSpec, inputs: tuple[np.ndarray, ...], queries: int = 16
    ) -> None:
        self._places = np.unique(np.linspace(0, spec.queries - 1, queries).astype(int))
        pattern = dataclasses.replace(
            spec.pattern,
            query_positions=spec.pattern.query_positions[self._places],
        )
        valid = None if spec.valid is None else spec.valid[:1]
        self._spec = dataclasses.replace(spec, pattern=pattern, valid=valid)
        q, k, v, gradient = inputs
        keys = (k[:1, :, :2], v[:1, :, :2])
        self._expected = reference(
            self._spec, self._take(q), *keys, self._take(gradient)
        )

    def _take(self, x: Any) -> np.ndarray:
        return np.asarray(x[:1, self._places, :2])

    def error(self, out: Any, dq: Any | None = None) -> float:
        """The larger relative error of an output and, if given, a gradient of q.

        Args:
          out: `[B, Q, H, h]`.
          dq: `[B, Q, H, h]`.
        """
        shown = (
            without_padding(self._spec, x)
            for x in (self._take(out), self._expected.out)
        )
        found = [relative_error(*shown)]
        if dq is not None:
            found.append(relative_error(self._take(dq), self._expected.dq))
        # NaN is as bad as infinity, and can be compared then.
        return float(np.nan_to_num(found, nan=np.inf, posinf=np.inf).max())
