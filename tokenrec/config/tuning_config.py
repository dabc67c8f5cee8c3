"""Config section `tuning`: what of a pretrained language model is trained."""

# ml_collections reads the annotations as types: they must not be postponed.

import dataclasses
from typing import Literal

from tokenrec.config.fields import BOUNDS, Bounds, field

TuningMethod = Literal["all", "frozen", "lora"]
PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
# Groups of weights that may have a learning rate of their own.
GROUPS = ("base", "words", "adapters", "rows", "makers", "head")


@dataclasses.dataclass
class TuningConfig:
    """What of a language model is trained: `gemma3`, `qwen3` and `llama3` only. Makers,
    heads, separators and semantic-id codes always are."""

    method: TuningMethod = "all"
    """`all` trains every weight. `frozen` leaves those of the checkpoint as they are,
    `lora` too, but adds a product of two narrow matrices to chosen projections. Frozen
    weights have the type `model.dtype`, no optimizer state, and are not part of
    checkpoints, which note the digest of `model.pretrained` instead."""

    rank: int = field(16, at_least=1)
    """`lora`: inner width r of the product."""

    alpha: float = field(32.0, above=0)
    """`lora`: the product is multiplied by alpha / r."""

    dropout: float = field(0.0, at_least=0, below=1)
    """`lora`: dropout rate of the inputs of the product."""

    projections: tuple[str, ...] = field(
        ("query", "key", "value", "output", "gate", "up", "down"), choices=PROJECTIONS
    )
    """`lora`: projections that get a product: of attention query, key, value, output, of
    the feed-forward network gate, up, down."""

    rates: dict[str, float] = dataclasses.field(
        default_factory=dict, metadata={BOUNDS: Bounds(at_least=0)}
    )
    """Factor of `optim.learning_rate` by group of weights: base (layers of the
    checkpoint), words (its word vectors), adapters (`lora`), rows (separators and
    codes), makers, head. 1 for a group that is not named."""
