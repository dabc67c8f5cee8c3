"""Check that the tokenizer of a data set is that of the language model.

A control token, such as `<start_of_turn>`, is one token of the model's vocabulary. A
tokenizer that does not know it would read its letters, which no model was trained on,
without a word of warning. Nor would a word that the model does not have be noticed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenrec.config.model_config import ModelConfig
from tokenrec.data.schema import FIRST_KNOWN, TEXT_TABLE, Schema
from tokenrec.data.tokenizer import TOKENIZER_FILE, encode_literal
from tokenrec.errors import InputError
from tokenrec.language.families import FAMILIES, Family
from tokenrec.runtime.files import is_file
from tokenrec.runtime.local_copy import local_copy

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Tokens that a tokenizer may have and its model no word vector for, such as that of an
# image.
MOST_ADDED = 256
_CONTROL = re.compile(r"<[^<>\s]+>")


def check_tokenizer(model: ModelConfig, schema: Schema, data: Path) -> None:
    """Check that the texts of a data set are written in the words of the model.

    Args:
      model: `model` of the run's config, of a kind in `FAMILIES`.
      schema: features that the model reads.
      data: folder of the data set.

    Raises:
      InputError: the data set has texts, and another tokenizer than that of
        `model.pretrained`, or more words than the model.
    """
    if not any(f.kind == "text" for f in schema.features):
        return
    remedy = "prepare the data with --tokenizer of the model"
    words = schema.tables[TEXT_TABLE] - FIRST_KNOWN
    if words > model.decoder.vocabulary + MOST_ADDED:
        raise InputError(
            f"data '{data}': its texts have {words:,} words, and the model has "
            f"model.decoder.vocabulary={model.decoder.vocabulary:,}; {remedy}"
        )
    if not model.pretrained:
        return
    own, given = (
        folder / TOKENIZER_FILE for folder in (data, local_copy(model.pretrained))
    )
    if is_file(given) and own.read_bytes() != given.read_bytes():
        raise InputError(
            f"data '{data}': its tokenizer is not that of model.pretrained="
            f"'{model.pretrained}', so that the words of its texts would be others of "
            f"the model; {remedy}, or exclude the texts (data.exclude)"
        )


def control_tokens(family: Family) -> tuple[str, ...]:
    """The control tokens of a family's chat format, each once.

    >>> control_tokens(FAMILIES["gemma3"])
    ('<bos>', '<start_of_turn>', '<end_of_turn>')
    """
    text = family.begin + "".join(family.turn)
    return tuple(dict.fromkeys(_CONTROL.findall(text)))


def check_literals(
    tokenizer: Tokenizer, texts: Sequence[str], model: ModelConfig, data: Path
) -> None:
    """Check that literal texts are words of the model, a control token a single one.

    Args:
      tokenizer: tokenizer of the data set.
      texts: literal texts of the prompt.
      model: `model` of the run's config, of a kind in `FAMILIES`.
      data: folder of the data set, for the message.

    Raises:
      InputError: the tokenizer makes several tokens of a control token, or a token that
        the model has no word vector for.
    """
    remedy = "prepare the data with --tokenizer of the model"
    for control in control_tokens(FAMILIES[model.kind]):
        if not any(control in text for text in texts):
            continue
        count = len(encode_literal(tokenizer, control))
        if count != 1:
            raise InputError(
                f"data '{data}': its tokenizer makes {count} tokens of '{control}', "
                f"which is one token of model.kind='{model.kind}'; {remedy}"
            )
    known = model.decoder.vocabulary
    for text in texts:
        highest = int(encode_literal(tokenizer, text).max(initial=0)) - FIRST_KNOWN
        if highest >= known:
            raise InputError(
                f"data '{data}': its tokenizer has a token {highest} for {text!r}, and "
                f"the model has model.decoder.vocabulary={known} words; {remedy}"
            )
