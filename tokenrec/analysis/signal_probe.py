"""Signal probe: how much of each signal its entity's soft tokens preserve.

A probe is a small model that predicts a signal (one feature of an entity) from the
tokens of the entity. It is trained on one half of the entities and judged on the other
(docs/methods.md section 5):

    dense signal        R2   = 1 - sum (y - y')^2 / sum (y - mean)^2
    categorical signal  gain = H(marginal) - cross-entropy of the probe, in nats

`mean` and `marginal` are those of the training half. The control is the same
measurement on `random_tokens` of equal width: a fixed random projection of the same
feature transforms.

n entities, N tokens of an entity, d their width, e = N d.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tokenrec.analysis.probe_inputs import Signal
from tokenrec.analysis.probe_models import fit_ridges, predict_mlp
from tokenrec.errors import InputError

# The most frequent values of a categorical signal are a class each; all others share
# one more class.
CATEGORIES = 50
CLASSES = CATEGORIES + 1
LEAST_ROWS = 64

# Candidates for the factor a of the scores in `softmax(a * score + log marginal)`.
SHARPNESS = np.array([0.0, *2.0 ** np.arange(-1, 10)])


@dataclasses.dataclass(frozen=True)
class _Split:
    """Indices of the entities.

    Attributes:
      fit: three eighths, on which probes are trained.
      choose: one eighth, which chooses the strength of a probe.
      judge: one half, on which probes are judged.
    """

    fit: np.ndarray
    choose: np.ndarray
    judge: np.ndarray


def probe_signals(
    tokens: np.ndarray, signals: dict[str, Signal], *, seed: int
) -> dict[str, dict[str, float]]:
    """Measure how well a linear and an MLP probe recover each signal from the tokens.

    The linear probe is a ridge regression in closed form. For a categorical signal it
    regresses the indicators of the classes, and its scores become the probabilities
    `softmax(a * score + log marginal)`. The MLP has one hidden layer. The penalty of
    the ridge regression, a, and the last round of the MLP's training are chosen on a
    quarter of the training half.

    Args:
      tokens: `[n, N, d]`; all tokens of an entity are read together.
      signals: name -> `[n]` values in the order of the tokens.
      seed: seed of the halves and of the MLP. Equal seeds and n give equal halves, so
        that two makers can be compared.

    Returns:
      Signal -> `{"linear", "mlp", "limit", "rows"}`. The first two are R2 or the gain
      in nats; "limit" is the most that can be reached, 1 or the cross-entropy of the
      marginal; "rows" is the number of judged entities that have a value. R2 is NaN if
      these all have one value.

    Raises:
      InputError: a shape is wrong, tokens are not finite, or too few entities have a
        value.
    """
    inputs = _flatten(tokens)
    count = len(inputs)
    split = _split(count, seed)
    inputs = _standardize(inputs, split)
    probed = {}
    for name, signal in signals.items():
        values = np.asarray(signal.values)
        if values.shape != (count,):
            raise InputError(
                f"signal '{name}' has the shape {values.shape}, but there are {count} "
                "entities; give [n]"
            )
        probe = _probe_dense if signal.kind == "dense" else _probe_categorical
        probed[name] = probe(name, inputs, values, split, seed)
    return probed


def _flatten(tokens: np.ndarray) -> np.ndarray:
    """Check tokens `[n, N, d]` and flatten them to `[n, e] float64`."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 3:
        raise InputError(
            f"tokens have the shape {tokens.shape}, but must be [n, N, d]; add an axis "
            "for the tokens"
        )
    if len(tokens) < LEAST_ROWS:
        raise InputError(
            f"tokens of {len(tokens)} entities are too few for a probe; give at least "
            f"{LEAST_ROWS}"
        )
    flat = tokens.reshape(len(tokens), -1).astype(np.float64)
    if not np.isfinite(flat).all():
        raise InputError(
            "tokens hold non-finite values; probe a model whose loss is finite"
        )
    return flat


def _split(count: int, seed: int) -> _Split:
    order = np.random.default_rng(seed).permutation(count)
    fit, choose = count * 3 // 8, count // 2
    return _Split(order[:fit], order[fit:choose], order[choose:])


def _standardize(inputs: np.ndarray, split: _Split) -> np.ndarray:
    """Scale to mean 0 and deviation 1 over `fit`; a constant column becomes 0."""
    mean, deviation = inputs[split.fit].mean(axis=0), inputs[split.fit].std(axis=0)
    # The deviation of a constant column is rounding error, relative to its value.
    constant = deviation <= 1e-9 * np.abs(mean)
    return np.where(constant, 0.0, (inputs - mean) / np.where(constant, 1.0, deviation))


def _probe_dense(
    name: str, inputs: np.ndarray, values: np.ndarray, split: _Split, seed: int
) -> dict[str, float]:
    """Probe a dense signal; the result is that of `probe_signals` for one signal.

    Args:
      name: name of the signal, for messages.
      inputs: `[n, e]`, standardised.
      values: `[n]`, NaN where missing.
      split: the entities of each purpose.
      seed: seed of the MLP.
    """
    # 1. Standardise the target; a missing value becomes 0, the mean.
    values = values.astype(np.float64)
    present = ~np.isnan(values)
    if min(present[part].sum() for part in dataclasses.astuple(split)) < 2:
        raise InputError(
            f"signal '{name}' has {present.sum()} values, too few for a probe; leave "
            "it out"
        )
    fit_values = values[split.fit][present[split.fit]]
    mean, deviation = fit_values.mean(), fit_values.std()
    target = np.where(present, (values - mean) / (deviation or 1.0), 0.0)
    fit, choose, judge = (
        part[present[part]] for part in (split.fit, split.choose, split.judge)
    )

    def r2(predicted: np.ndarray) -> float:
        """R2 of `[judge]` predictions; the mean of the training half is 0."""
        total = np.square(target[judge]).sum()
        if np.ptp(target[judge]) == 0:
            return float("nan")
        return float(1 - np.square(target[judge] - predicted).sum() / total)

    # 2. The linear probe. Its inputs are centred over the entities with a value, whose
    # mean is not 0 where values are missing.
    centred = inputs - inputs[fit].mean(axis=0)
    weights = fit_ridges(centred[fit], target[fit, None])
    errors = [
        np.square(target[choose] - centred[choose] @ w[:, 0]).sum() for w in weights
    ]
    linear = centred[judge] @ weights[int(np.argmin(errors))][:, 0]

    # 3. The MLP, which starts at the mean.
    start = np.zeros(1)
    outputs = predict_mlp(
        inputs,
        target.astype(np.float32),
        present,
        start,
        split.fit,
        split.choose,
        seed,
    )
    return {
        "linear": r2(linear),
        "mlp": r2(outputs[judge, 0]),
        "limit": 1.0,
        "rows": float(len(judge)),
    }


def _probe_categorical(
    name: str, inputs: np.ndarray, values: np.ndarray, split: _Split, seed: int
) -> dict[str, float]:
    """Probe a categorical signal of ids `values: [n]`; otherwise as `_probe_dense`."""
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError(
            f"signal '{name}' holds {values.dtype} values, but ids are integers; cast "
            "it or call it dense"
        )
    # 1. Classes and their marginal, from the training half.
    training = np.concatenate([split.fit, split.choose])
    target, classes = _classes(values, values[training])
    marginal = _log_marginal(target[training], classes)

    def cross_entropy(logits: np.ndarray, entities: np.ndarray) -> float:
        """Mean cross-entropy of logits `[m, CLASSES]` of m entities, in nats."""
        peak = logits.max(axis=1)
        total = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))
        chosen = logits[np.arange(len(entities)), target[entities]]
        return float(np.mean(total - chosen))

    # 2. The linear probe: the best pair of penalty and sharpness. A sharpness of 0 is
    # the marginal, so that the probe loses nothing where there is nothing to find.
    indicators = np.eye(CLASSES)[target[split.fit]]
    best = (np.inf, np.zeros((inputs.shape[1], CLASSES)), 0.0)
    for weights in fit_ridges(inputs[split.fit], indicators - indicators.mean(axis=0)):
        scores = inputs[split.choose] @ weights
        for a in SHARPNESS:
            entropy = cross_entropy(a * scores + marginal, split.choose)
            best = min(best, (entropy, weights, float(a)), key=lambda entry: entry[0])
    _, weights, a = best
    linear = cross_entropy(a * (inputs[split.judge] @ weights) + marginal, split.judge)

    # 3. The MLP, which starts at the marginal.
    present = np.ones(len(values), bool)
    outputs = predict_mlp(
        inputs, target, present, marginal, split.fit, split.choose, seed
    )
    mlp = cross_entropy(outputs[split.judge], split.judge)

    constant = np.broadcast_to(marginal, (len(split.judge), CLASSES))
    limit = cross_entropy(constant, split.judge)
    return {
        "linear": limit - linear,
        "mlp": limit - mlp,
        "limit": limit,
        "rows": float(len(split.judge)),
    }


def _classes(values: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, int]:
    """Map values to classes by their frequency in the training half.

    Args:
      values: `[n]`, ids of all entities.
      training: ids of the training half.

    Returns:
      `[n]`, the class of each value, `CATEGORIES` for all but the most frequent; and
      the number of frequent values.
    """
    known, counts = np.unique(training, return_counts=True)
    frequent = np.sort(known[np.argsort(-counts, kind="stable")[:CATEGORIES]])
    index = np.minimum(np.searchsorted(frequent, values), len(frequent) - 1)
    return np.where(frequent[index] == values, index, CATEGORIES), len(frequent)


def _log_marginal(target: np.ndarray, classes: int) -> np.ndarray:
    """Logarithms `[CLASSES]` of the smoothed frequencies of classes.

    Args:
      target: classes of the training half.
      classes: number of frequent values; the class `CATEGORIES` is possible too.
    """
    possible = np.arange(CLASSES) < classes
    possible[CATEGORIES] = True
    counts = np.bincount(target, minlength=CLASSES)
    # Half a count more for each possible class: a value that only the judged half has
    # needs a probability too.
    smoothed = counts + 0.5
    return np.log(np.where(possible, smoothed, 1e-30) / smoothed[possible].sum())
