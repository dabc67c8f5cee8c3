"""Signal probe: how much of each signal survives in the soft tokens of its entity (methods.md section 5).

Probes learn on one half of the entities and are judged on the other. What they find in a maker's tokens is to be held
against what they find in `random_tokens` of the same width: a fixed random map of the same transforms.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tokenrec.data.schema import MISSING, Feature, columns
from tokenrec.errors import InputError
from tokenrec.tokens.feature_transforms import normalize_dense

CATEGORIES = 50  # the most frequent values that are told apart; all others are one more
CLASSES = CATEGORIES + 1
LEAST_ROWS = 64

RIDGES = np.array(
    [1e-6, 1e-4, 1e-2, 1e-1, 1.0, 10.0]
)  # per row and unit of a feature's variance
SHARPNESS = np.array(
    [0.0, *2.0 ** np.arange(-1, 10)]
)  # of the softmax over the scores of a ridge

HIDDEN = 128
ROUNDS, STEPS, BATCH = (
    20,
    50,
    512,
)  # of the MLP; after each round it is judged on the rows that choose
RATE, DECAY = 3e-3, 1e-2


@dataclasses.dataclass(frozen=True)
class Signal:
    """Values of one signal, an entity each: `[n]` floats, NaN where missing ("dense"), or `[n]` ids ("categorical").

    Dense values are best given as the model sees them, transformed and normalised. A missing id is a value like
    others. A semantic id is a categorical signal per level.
    """

    kind: Literal["dense", "categorical"]
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Row numbers: three eighths of the entities fit a probe, one eighth chooses its strength, one half judges it."""

    fit: np.ndarray
    choose: np.ndarray
    judge: np.ndarray


def probe_signals(
    tokens: np.ndarray, signals: dict[str, Signal], *, seed: int
) -> dict[str, dict[str, float]]:
    """How well a linear and a small MLP probe recover each signal from an entity's tokens, on the held-out half.

    The linear probe is a ridge regression in closed form. For a categorical signal it regresses the indicators of the
    values, and its scores become probabilities `softmax(a * score + log marginal)`. The MLP has one hidden layer. The
    strength of the ridge, a, and the end of the MLP's training are chosen on rows of the fitting half.

    Args:
      tokens: `[n, N, d]`, all tokens of an entity are read together.
      signals: by name, `[n]` values in the same order.
      seed: of the halves and of the MLP; equal seeds and n give equal halves, so that two makers can be compared.

    Returns:
      By signal: `linear` and `mlp`: R2 of a dense signal, against the mean of the fitting half; of a categorical one
      the cross-entropy, in nats, gained over the marginal of the fitting half. `limit`: the most that could be
      gained, 1 or the held-out cross-entropy of that marginal. `rows`: held-out entities that have a value. R2 is NaN
      where these all have one value.

    Raises:
      InputError: a shape is wrong, tokens are not finite, or too few entities have a value.
    """
    inputs = _flat(tokens)
    rows = len(inputs)
    parts = _split(rows, seed)
    inputs = _standardised(inputs, parts)
    found = {}
    for name, signal in signals.items():
        values = np.asarray(signal.values)
        if values.shape != (rows,):
            raise InputError(
                f"signal '{name}' has the shape {values.shape}, but there are {rows} entities; give [n]"
            )
        probe = _probe_dense if signal.kind == "dense" else _probe_categorical
        found[name] = probe(name, inputs, values, parts, seed)
    return found


def entity_signals(
    features: tuple[Feature, ...], ids: np.ndarray, dense: np.ndarray
) -> dict[str, Signal]:
    """The signals behind the columns `ids: [n, I]`, `dense: [n, D]` of an entity's features (`schema.columns`).

    A dense value is normalised as for the model. A semantic id gives a signal per level, an embedding one per number
    (`code[0]`, `code[1]`). Of a list or a text, whose order a maker does not see, it is whether it holds its most
    frequent value.
    """
    place, found = columns(features), {}
    for f in features:
        values = (ids if f.is_integer else dense)[
            :, slice(*(place.ids if f.is_integer else place.dense)[f.name])
        ]
        if f.kind == "categorical":
            found[f.name] = Signal("categorical", values[:, 0])
        elif f.kind == "dense":
            normalised = np.asarray(normalize_dense(jnp.asarray(values), f))
            found[f.name] = Signal(
                "dense", np.where(normalised[:, 1] > 0, np.nan, normalised[:, 0])
            )
        elif f.has_vocabulary or f.kind == "text":
            held, counts = np.unique(values[values != MISSING], return_counts=True)
            frequent = held[np.argmax(counts)] if len(held) else MISSING
            found[f.name] = Signal(
                "categorical", (values == frequent).any(axis=1).astype(np.int32)
            )
        else:
            kind: Literal["dense", "categorical"] = (
                "categorical" if f.kind == "semantic_id" else "dense"
            )
            found |= {
                f"{f.name}[{i}]": Signal(kind, values[:, i]) for i in range(f.length)
            }
    return found


def random_tokens(
    transforms: np.ndarray, tokens: int, width: int, *, seed: int
) -> np.ndarray:
    """`[n, e]` concatenated transforms of an entity's features -> `[n, tokens, width]` by a fixed Gaussian map.

    The control: nothing in the map is trained, and entries have the variance 1 / e.
    """
    if transforms.ndim != 2:
        raise InputError(
            f"transforms have the shape {transforms.shape}, but must be [n, e]; concatenate them"
        )
    inputs = transforms.shape[1]
    draw = np.random.default_rng(seed).normal(size=(inputs, tokens * width)) / np.sqrt(
        inputs
    )
    return (
        (transforms.astype(np.float64) @ draw)
        .astype(np.float32)
        .reshape(len(transforms), tokens, width)
    )


def _flat(tokens: np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 3:
        raise InputError(
            f"tokens have the shape {tokens.shape}, but must be [n, N, d]; add an axis for the tokens"
        )
    if len(tokens) < LEAST_ROWS:
        raise InputError(
            f"tokens of {len(tokens)} entities are too few for a probe; give at least {LEAST_ROWS}"
        )
    flat = tokens.reshape(len(tokens), -1).astype(np.float64)
    if not np.isfinite(flat).all():
        raise InputError(
            "tokens hold values that are not finite; probe a model whose loss is finite"
        )
    return flat


def _split(rows: int, seed: int) -> _Parts:
    order = np.random.default_rng(seed).permutation(rows)
    fit, choose = rows * 3 // 8, rows // 2
    return _Parts(order[:fit], order[fit:choose], order[choose:])


def _standardised(inputs: np.ndarray, parts: _Parts) -> np.ndarray:
    """Mean 0 and deviation 1 over the rows that fit; a constant column becomes 0."""
    mean, deviation = inputs[parts.fit].mean(axis=0), inputs[parts.fit].std(axis=0)
    constant = deviation <= 1e-9 * np.abs(mean)
    return np.where(constant, 0.0, (inputs - mean) / np.where(constant, 1.0, deviation))


def _probe_dense(
    name: str, inputs: np.ndarray, values: np.ndarray, parts: _Parts, seed: int
) -> dict[str, float]:
    values = values.astype(np.float64)
    present = ~np.isnan(values)
    if min(present[part].sum() for part in dataclasses.astuple(parts)) < 2:
        raise InputError(
            f"signal '{name}' has {present.sum()} values, too few for a probe; leave it out"
        )
    mean, deviation = (
        values[parts.fit][present[parts.fit]].mean(),
        values[parts.fit][present[parts.fit]].std(),
    )
    target = np.where(present, (values - mean) / (deviation or 1.0), 0.0)
    fit, choose, judge = (
        part[present[part]] for part in (parts.fit, parts.choose, parts.judge)
    )

    def r2(predicted: np.ndarray) -> float:
        total = np.square(target[judge]).sum()
        constant = np.ptp(target[judge]) == 0
        return (
            float("nan")
            if constant
            else float(1 - np.square(target[judge] - predicted).sum() / total)
        )

    centred = inputs - inputs[fit].mean(
        axis=0
    )  # the mean over all rows is another where values are missing
    weights = _ridges(centred[fit], target[fit, None])
    errors = [
        np.square(target[choose] - centred[choose] @ w[:, 0]).sum() for w in weights
    ]
    linear = centred[judge] @ weights[int(np.argmin(errors))][:, 0]
    mlp = _train_mlp(
        inputs, target.astype(np.float32), present, np.zeros(1), parts, seed
    )[judge, 0]
    return {
        "linear": r2(linear),
        "mlp": r2(mlp),
        "limit": 1.0,
        "rows": float(len(judge)),
    }


def _probe_categorical(
    name: str, inputs: np.ndarray, values: np.ndarray, parts: _Parts, seed: int
) -> dict[str, float]:
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError(
            f"signal '{name}' holds {values.dtype} values, but ids are integers; cast it or call it dense"
        )
    known, counts = np.unique(
        values[np.concatenate([parts.fit, parts.choose])], return_counts=True
    )
    frequent = np.sort(known[np.argsort(-counts, kind="stable")[:CATEGORIES]])
    at = np.minimum(np.searchsorted(frequent, values), len(frequent) - 1)
    target = np.where(frequent[at] == values, at, CATEGORIES)
    # Half a count more in each class that there can be: a value of the held-out half alone has a probability too.
    possible = np.arange(CLASSES) < len(frequent)
    possible[CATEGORIES] = True
    counted = np.bincount(
        target[np.concatenate([parts.fit, parts.choose])], minlength=CLASSES
    )
    marginal = np.log(
        np.where(possible, counted + 0.5, 1e-30) / (counted + 0.5)[possible].sum()
    )

    def cross_entropy(logits: np.ndarray, rows: np.ndarray) -> float:
        peak = logits.max(axis=1)
        total = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))
        return float(np.mean(total - logits[np.arange(len(rows)), target[rows]]))

    indicators = np.eye(CLASSES)[target[parts.fit]]
    best = (np.inf, np.zeros((inputs.shape[1], CLASSES)), 0.0)
    for weights in _ridges(inputs[parts.fit], indicators - indicators.mean(axis=0)):
        scores = inputs[parts.choose] @ weights
        for a in SHARPNESS:
            entropy = cross_entropy(a * scores + marginal, parts.choose)
            best = min(best, (entropy, weights, float(a)), key=lambda found: found[0])
    limit = cross_entropy(
        np.broadcast_to(marginal, (len(parts.judge), CLASSES)), parts.judge
    )
    linear = cross_entropy(
        best[2] * (inputs[parts.judge] @ best[1]) + marginal, parts.judge
    )
    present = np.ones(len(values), bool)
    mlp = cross_entropy(
        _train_mlp(inputs, target, present, marginal, parts, seed)[parts.judge],
        parts.judge,
    )
    return {
        "linear": limit - linear,
        "mlp": limit - mlp,
        "limit": limit,
        "rows": float(len(parts.judge)),
    }


def _ridges(inputs: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
    """Ridge regressions `[e, k]`, one per strength, of targets `[n, k]` on inputs `[n, e]`; both are centred."""
    roots, axes = np.linalg.eigh(inputs.T @ inputs / len(inputs))
    projected = axes.T @ (inputs.T @ targets) / len(inputs)
    return [
        axes @ (projected / (np.maximum(roots, 0) + ridge)[:, None]) for ridge in RIDGES
    ]


def _train_mlp(
    inputs: np.ndarray,
    target: np.ndarray,
    present: np.ndarray,
    start: np.ndarray,
    parts: _Parts,
    seed: int,
) -> np.ndarray:
    """Outputs `[n, k]` of an MLP that is trained from the output `start: [k]` on; squared error where k is 1."""
    key = jax.random.key(seed)
    return np.asarray(
        _fit_mlp(
            key,
            jnp.asarray(inputs, jnp.float32),
            jnp.asarray(target),
            jnp.asarray(present, jnp.float32),
            jnp.asarray(start, jnp.float32),
            jnp.asarray(parts.fit),
            jnp.asarray(parts.choose),
        )
    ).astype(np.float64)


type _Weights = dict[str, jax.Array]


def _mlp(weights: _Weights, inputs: jax.Array) -> jax.Array:
    hidden = jax.nn.gelu(inputs @ weights["inner"] + weights["inner_bias"])
    return hidden @ weights["outer"] + weights["outer_bias"]


def _loss(
    weights: _Weights, inputs: jax.Array, target: jax.Array, present: jax.Array
) -> jax.Array:
    """Mean over the rows that have a value: squared error of one output, cross-entropy of several."""
    out = _mlp(weights, inputs)
    if out.shape[1] == 1:
        losses = jnp.square(out[:, 0] - target)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(out, target)
    return jnp.sum(losses * present) / jnp.maximum(jnp.sum(present), 1)


@jax.jit
def _fit_mlp(
    key: jax.Array,
    inputs: jax.Array,
    target: jax.Array,
    present: jax.Array,
    start: jax.Array,
    fit: jax.Array,
    choose: jax.Array,
) -> jax.Array:
    """AdamW with a cosine; the weights of the round that does best on `choose`, or those of the start."""
    weights_key, rows_key = jax.random.split(key)
    width = inputs.shape[1]
    weights: _Weights = {
        "inner": jax.random.normal(weights_key, (width, HIDDEN)) * width**-0.5,
        "inner_bias": jnp.zeros(HIDDEN),
        "outer": jnp.zeros((HIDDEN, len(start))),
        "outer_bias": start,
    }
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(RATE, ROUNDS * STEPS), weight_decay=DECAY
    )
    judged = functools.partial(
        _loss, inputs=inputs[choose], target=target[choose], present=present[choose]
    )

    def step(
        carry: tuple[_Weights, optax.OptState], key: jax.Array
    ) -> tuple[tuple[_Weights, optax.OptState], None]:
        weights, state = carry
        rows = fit[jax.random.randint(key, (min(BATCH, len(fit)),), 0, len(fit))]
        gradient = jax.grad(_loss)(weights, inputs[rows], target[rows], present[rows])
        updates, state = optimizer.update(gradient, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    def round_(
        carry: tuple[_Weights, optax.OptState, _Weights, jax.Array], keys: jax.Array
    ) -> tuple[tuple[_Weights, optax.OptState, _Weights, jax.Array], None]:
        weights, state, best, least = carry
        (weights, state), _ = jax.lax.scan(step, (weights, state), keys)
        loss = judged(weights)
        best = jax.tree.map(
            lambda new, old: jnp.where(loss < least, new, old), weights, best
        )
        return (weights, state, best, jnp.minimum(loss, least)), None

    keys = jax.random.split(rows_key, (ROUNDS, STEPS))
    carry = (weights, optimizer.init(weights), weights, judged(weights))
    (_, _, best, _), _ = jax.lax.scan(round_, carry, keys)
    return _mlp(best, inputs)
