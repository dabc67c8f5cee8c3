"""Format numbers and names for readers."""

from __future__ import annotations

from tokenrec.analysis.study_metrics import Spread
from tokenrec.analysis.study_rows import TOKENS, Difference

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def metric_name(metric: str) -> str:
    """Format the name of a metric.

    >>> metric_name("auc"), metric_name("ndcg@10"), metric_name("normalized_entropy")
    ('AUC', 'NDCG@10', 'normalised entropy')
    >>> metric_name("frozen_gauc")
    'GAUC frozen'
    """
    written = {
        "frozen_auc": "AUC frozen",
        "frozen_gauc": "GAUC frozen",
        "log_loss": "log loss",
        "normalized_entropy": "normalised entropy",
        "recall": "Recall",
    }
    name, at, k = metric.partition("@")
    return written.get(name, name.upper()) + at + k


def decimal(value: float | None, *, sign: bool = False, places: int = 4) -> str:
    """Format a number with a fixed number of decimal places.

    Args:
      value: the number; None becomes a dash.
      sign: write a plus sign before positive numbers.
      places: decimal places.

    >>> decimal(0.75218), decimal(-0.00121, sign=True), decimal(0.5, sign=True)
    ('0.7522', '−0.0012', '+0.5000')
    >>> decimal(-0.00001, sign=True), decimal(None)
    ('0.0000', '–')
    """
    if value is None:
        return DASH
    # Adding 0 turns the -0.0 of a rounded small number into 0.0.
    rounded = round(value, places) + 0.0
    plus = "+" if sign and rounded else ""
    return f"{rounded:{plus}.{places}f}".replace("-", MINUS)


def si_number(value: float) -> str:
    """Format a number with three significant digits and an SI prefix.

    >>> si_number(1234567), si_number(2.5e9), si_number(12)
    ('1.23 M', '2.50 G', '12')
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            scaled = value / size
            return (
                f"{scaled:.3g} {letter}" if scaled >= 10 else f"{scaled:.2f} {letter}"
            )
    return f"{value:g}"


def interval_text(difference: Difference) -> str:
    """Format the 95 % interval of a difference."""
    low, high = decimal(difference.low, sign=True), decimal(difference.high, sign=True)
    return f"[{low}, {high}]"


def plain_spread(value: Spread, places: int = 4) -> str:
    """Format mean and deviation.

    >>> plain_spread(Spread(0.75218, 0.0011, 3)), plain_spread(Spread(0.5, None, 1))
    ('0.7522 ± 0.0011', '0.5000')
    """
    mean = decimal(value.mean, places=places)
    if value.deviation is None:
        return mean
    return f"{mean} ± {decimal(value.deviation, places=places)}"


def layer_name(layer: int) -> str:
    """Format the number of a layer.

    >>> layer_name(-1), layer_name(0)
    ('tokens', 'layer 0')
    """
    return "tokens" if layer == TOKENS else f"layer {layer}"
