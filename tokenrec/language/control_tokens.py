"""Control tokens of a family's chat format, in the tokenizer of a data set.

A control token, such as `<start_of_turn>`, is one token of the model's vocabulary. A
tokenizer that does not know it would read its letters, which no model was trained on,
without a word of warning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenrec.data.tokenizer import encode_literal
from tokenrec.errors import InputError
from tokenrec.language.families import FAMILIES, Family

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTROL = re.compile(r"<[^<>\s]+>")


def control_tokens(family: Family) -> tuple[str, ...]:
    """The control tokens of a family's chat format, each once.

    >>> control_tokens(FAMILIES["gemma3"])
    ('<bos>', '<start_of_turn>', '<end_of_turn>')
    """
    text = family.begin + "".join(family.turn)
    return tuple(dict.fromkeys(_CONTROL.findall(text)))


def check_control_tokens(
    tokenizer: Tokenizer, texts: Sequence[str], kind: str, data: Path
) -> None:
    """Check that the control tokens in literal texts are single tokens.

    Args:
      tokenizer: tokenizer of the data set.
      texts: literal texts of the prompt.
      kind: `model.kind`, a name of `FAMILIES`.
      data: folder of the data set, for the message.

    Raises:
      InputError: the tokenizer makes several tokens of one.
    """
    for control in control_tokens(FAMILIES[kind]):
        if not any(control in text for text in texts):
            continue
        count = len(encode_literal(tokenizer, control))
        if count != 1:
            raise InputError(
                f"data '{data}': its tokenizer makes {count} tokens of '{control}', "
                f"which is one token of model.kind='{kind}'; prepare the data with "
                "--tokenizer of the model"
            )
