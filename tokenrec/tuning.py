"""Which weights of a language model are trained, and how fast.

    group      weights                                                     trained
    base       layers and last norm of the checkpoint                      method="all"
    words      its word vectors                                            method="all"
    adapters   low-rank products beside projections (models/adapters.py)   method="lora"
    rows       separators and vectors of semantic-id codes                 always
    head       heads of ranking and of the next item                       always
    makers     everything else                                             always

Frozen weights have the type of the computation, no gradient and no optimizer state, and
no place in a checkpoint: they are read from `model.pretrained` again
(`tokenrec/checkpoint/pretrained.py`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from tokenrec.config import Config
from tokenrec.config.backbones import is_decoder

if TYPE_CHECKING:
    from tokenrec.state import TrainState

_ADAPTER = "_adapter/"
_NEW_ROWS = ("separators", "head/inputs", "head/outputs")


def group_of(name: str) -> str:
    """Group of a dense weight of a language model, one of `tuning_config.GROUPS`.

    >>> group_of("backbone/blocks/0/attention/query_adapter/up")
    'adapters'
    """
    if _ADAPTER in name:
        return "adapters"
    if name in _NEW_ROWS:
        return "rows"
    first = name.partition("/")[0]
    return {"backbone": "base", "words": "words", "head": "head"}.get(first, "makers")


def is_frozen(config: Config, name: str) -> bool:
    """Whether a dense weight is left as it is in the checkpoint."""
    return (
        is_decoder(config.model)
        and config.tuning.method != "all"
        and group_of(name) in ("base", "words")
    )


def split_frozen[T](
    config: Config, weights: dict[str, T]
) -> tuple[dict[str, T], dict[str, T]]:
    """Split anything that is given by name of a weight into trained and frozen."""
    if not is_decoder(config.model) or config.tuning.method == "all":
        return weights, {}
    frozen = {name: w for name, w in weights.items() if is_frozen(config, name)}
    trained = {name: w for name, w in weights.items() if name not in frozen}
    return trained, frozen


def without_frozen(config: Config, state: TrainState) -> TrainState:
    """The state as checkpoints hold it: without the frozen weights."""
    trained, frozen = split_frozen(config, state.params)
    return dataclasses.replace(state, params=trained) if frozen else state


def rate_factor(config: Config, name: str) -> float:
    """Factor of the learning rate of a dense weight (`tuning.rates`)."""
    rates = config.tuning.rates
    return rates.get(group_of(name), 1.0) if rates else 1.0
