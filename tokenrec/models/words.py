"""The word vectors of a language model, which read the texts of a prompt.

A text feature and the literal text of a prompt hold ids of the data set's tokenizer,
which is that of the language model (`tokenrec prepare --tokenizer`): id 0 fills a text
up, and id 2 + n is word n of the model (`tokenrec.data.schema.FIRST_KNOWN`).

Letters: V words, V' rows, d model width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import Config, ModelConfig
from tokenrec.config.alignment import TITLE, alignment_tasks
from tokenrec.config.backbones import is_decoder
from tokenrec.data.schema import FIRST_KNOWN, TEXT_TABLE
from tokenrec.data.semantic_id_feature import SEMANTIC_ID
from tokenrec.errors import InputError
from tokenrec.language.families import FAMILIES
from tokenrec.ops.column_lookup import look_up_columns
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import weight
from tokenrec.sharding import RULES

# The rows are a multiple of this, the lanes of a TPU.
ROW_MULTIPLE = 128


def word_rows(config: ModelConfig) -> int:
    """V', rows of the word vectors: V, rounded up to `ROW_MULTIPLE`."""
    return -(-config.decoder.vocabulary // ROW_MULTIPLE) * ROW_MULTIPLE


def word_scale(config: ModelConfig) -> float:
    """Factor of a vector that is read: the root of d in Gemma, otherwise 1."""
    return math.sqrt(config.width) if FAMILIES[config.kind].scaled_words else 1.0


def shares_codes(config: Config) -> bool:
    """Whether semantic ids in a prompt are read with the vectors of the head's codes.

    They are new words of a language model then, the same ones where they are read and
    where they are generated.
    """
    return (
        is_decoder(config.model)
        and config.data.objective == "retrieval"
        and config.head.retrieval == "semantic_id"
        and config.tokens.semantic_id != "prefix"
    )


def own_tables(config: Config) -> tuple[str, ...]:
    """Tables of features that a language model reads with vectors of its own."""
    if not is_decoder(config.model):
        return ()
    return (TEXT_TABLE, *((SEMANTIC_ID,) if shares_codes(config) else ()))


def writes_words(config: Config) -> bool:
    """Whether the model learns to write texts, so that words are scored."""
    return any(task.answer == TITLE for task in alignment_tasks(config))


class WordTable(nnx.Module):
    """Read words, and score read-outs against all words.

    Args:
      config: `model` of the run's config, with its `decoder`.
      scored: words are scored too. A recommender that writes no texts leaves the vectors
        for that to the checkpoint.

    Attributes:
      inputs: `[V', d]`, vectors that words are read with.
      outputs: `[V', d]`, vectors that they are scored with; None if these are the same,
        or words are not scored.
    """

    def __init__(self, config: ModelConfig, *, scored: bool = False, rngs: nnx.Rngs):
        self.words = config.decoder.vocabulary
        self.scale = word_scale(config)
        self.cap = config.decoder.logit_cap
        shape = (word_rows(config), config.width)
        self.inputs = weight(rngs, shape, None, "embed", inputs=config.width)
        self.is_scored = scored or config.decoder.tied
        self.outputs = (
            None
            if config.decoder.tied or not scored
            else weight(rngs, shape, None, "embed", inputs=config.width)
        )

    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Read the words of `ids: [...] int32` of the tokenizer, `[..., d]`.

        An id that fills a text up reads word 0; attention must not see it.
        """
        words = jnp.maximum(ids - FIRST_KNOWN, 0)
        rows = look_up_columns(self.inputs[...], words, dtype)
        return rows * jnp.asarray(self.scale, dtype)

    def logits(self, h: jax.Array) -> jax.Array:
        """Score read-outs `[B, R, d]` against all words, `[B, R, V'] float32`.

        The products have the dtype of `h`, as those of a language model's own head.
        Rows that fill V up to V' score -inf.

        Raises:
          InputError: the table was made without `scored`.
        """
        if not self.is_scored:
            raise InputError(
                "words are not scored here; make the table with scored=True"
            )
        table = self.inputs if self.outputs is None else self.outputs
        scores = contract(
            "brd,vd->brv", h, table[...], RULES("batch", None, None)
        ).astype(jnp.float32)
        if self.cap:
            scores = self.cap * jnp.tanh(scores / self.cap)
        return jnp.where(jnp.arange(scores.shape[-1]) < self.words, scores, -jnp.inf)
