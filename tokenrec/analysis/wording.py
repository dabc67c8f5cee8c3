"""Numbers and names as readers write them."""

from __future__ import annotations

from tokenrec.analysis.study_files import TOKENS, Difference
from tokenrec.analysis.summary import Spread

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def metric_name(metric: str) -> str:
    """As readers write it.

    >>> metric_name("auc"), metric_name("ndcg@10"), metric_name("normalized_entropy")
    ('AUC', 'NDCG@10', 'normalised entropy')
    """
    written = {
        "log_loss": "log loss",
        "normalized_entropy": "normalised entropy",
        "recall": "Recall",
    }
    name, at, k = metric.partition("@")
    return written.get(name, name.upper()) + at + k


def decimal(value: float | None, *, sign: bool = False, places: int = 4) -> str:
    """
    >>> decimal(0.75218), decimal(-0.00121, sign=True), decimal(-0.00001, sign=True), decimal(None)
    ('0.7522', '−0.0012', '0.0000', '–')
    """
    if value is None:
        return DASH
    rounded = round(value, places) + 0.0  # -0.0 becomes 0.0
    return f"{rounded:{'+' if sign and rounded else ''}.{places}f}".replace("-", MINUS)


def si_number(value: float) -> str:
    """
    >>> si_number(1234567), si_number(2.5e9), si_number(12)
    ('1.23 M', '2.50 G', '12')
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return (
                f"{value / size:.3g} {letter}"
                if value >= 10 * size
                else f"{value / size:.2f} {letter}"
            )
    return f"{value:g}"


def interval_text(gap: Difference) -> str:
    return f"[{decimal(gap.low, sign=True)}, {decimal(gap.high, sign=True)}]"


def plain_spread(value: Spread, places: int = 4) -> str:
    """
    >>> plain_spread(Spread(0.75218, 0.0011, 3)), plain_spread(Spread(0.5, None, 1))
    ('0.7522 ± 0.0011', '0.5000')
    """
    deviation = (
        ""
        if value.deviation is None
        else f" ± {decimal(value.deviation, places=places)}"
    )
    return decimal(value.mean, places=places) + deviation


def layer_name(layer: int) -> str:
    """
    >>> layer_name(-1), layer_name(0)
    ('tokens', 'layer 0')
    """
    return "tokens" if layer == TOKENS else f"layer {layer}"
