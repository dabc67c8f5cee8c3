"""Compare an implementation of attention with the reference, values and gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_specs import AttentionSpec
from tokenrec.ops.attention.dense import dense_attention


class Differences(NamedTuple):
    """Largest absolute differences from the reference.

    Attributes:
      values: of the outputs of queries that are not padding.
      gradients: of the gradients of q, k and v.
    """

    values: float
    gradients: float


def values_and_gradients(attend, spec: AttentionSpec):
    """Output and gradients of q, k and v, for a random gradient of the output.

    Outputs of padding differ between implementations: they and their gradients are 0.

    Args:
      attend: `(q, k, v, valid) -> out`, `[B, Q, H, h]`.
      spec: the arguments.
    """
    q, k, v, gradient = spec.random_inputs()
    valid = None if spec.valid is None else jnp.asarray(spec.valid)
    if valid is not None:
        pattern = spec.pattern
        query_places = np.searchsorted(pattern.key_positions, pattern.query_positions)
        gradient = gradient * valid[:, query_places, None, None]

    def loss(q, k, v):
        out = attend(q, k, v, valid)
        shown = jnp.where(gradient == 0, 0, out)
        return jnp.sum(out.astype(jnp.float32) * gradient), shown

    (_, out), gradients = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    )(q, k, v)
    return out, gradients


def differences_from_dense(attend, spec: AttentionSpec) -> Differences:
    """Compare `attend(q, k, v, valid)` with `dense`."""

    def dense(q, k, v, valid):
        return dense_attention(q, k, v, spec.pattern, spec.window, valid)

    out, gradients = values_and_gradients(attend, spec)
    expected, expected_gradients = values_and_gradients(dense, spec)
    return Differences(
        float(jnp.max(jnp.abs(out - expected))),
        max(
            float(jnp.max(jnp.abs(got - wanted)))
            for got, wanted in zip(gradients, expected_gradients, strict=True)
        ),
    )
