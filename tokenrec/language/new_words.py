"""The rows that a recommender adds to a language model, as words of a checkpoint.

    <sep_N>          separator N of the prompt
    <sid_L_C>        code C of level L of a semantic id

They follow the tokens of the tokenizer. Where a model has more word vectors than its
tokenizer has tokens (some keep a reserve), they take those first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenrec.data.tokenizer import TOKENIZER_FILE, tokenizers_library
from tokenrec.errors import InputError
from tokenrec.language.weight_names import INPUTS, OUTPUTS

SEPARATORS = "separators"
CODE_INPUTS, CODE_OUTPUTS = "head/inputs", "head/outputs"


class NewWords(NamedTuple):
    """New words and their vectors.

    Attributes:
      names: n tokens.
      rows: `words/inputs` and, in a model whose words are not tied, `words/outputs` ->
        `[n, d]`.
      weights: names of the weights that they are made of.
    """

    names: tuple[str, ...]
    rows: dict[str, np.ndarray]
    weights: tuple[str, ...]


def new_words(
    params: Mapping[str, np.ndarray], levels: tuple[int, ...], *, tied: bool
) -> NewWords:
    """Collect the new words of a run.

    Codes that are read with other vectors than they are scored with are no words of a
    model that has one vector a word; they are left to the other weights then.

    Args:
      params: dense weights by name.
      levels: codes of each level of the head's semantic ids; () without such a head.
      tied: the model has one vector a word.
    """
    names: list[str] = []
    inputs: list[np.ndarray] = []
    outputs: list[np.ndarray] = []
    weights: list[str] = []
    if SEPARATORS in params:
        vectors = params[SEPARATORS]
        names += [f"<sep_{n}>" for n in range(len(vectors))]
        inputs.append(vectors)
        # A separator is never predicted.
        outputs.append(np.zeros_like(vectors))
        weights.append(SEPARATORS)
    if levels and CODE_OUTPUTS in params and not (tied and CODE_INPUTS in params):
        rows = np.concatenate(
            [
                level * max(levels) + np.arange(count)
                for level, count in enumerate(levels)
            ]
        )
        names += [
            f"<sid_{level}_{code}>"
            for level, count in enumerate(levels)
            for code in range(count)
        ]
        scored = params[CODE_OUTPUTS]
        inputs.append(params.get(CODE_INPUTS, scored)[rows])
        outputs.append(scored[rows])
        weights += [name for name in (CODE_INPUTS, CODE_OUTPUTS) if name in params]
    if not names:
        return NewWords((), {}, ())
    added = {INPUTS: np.concatenate(inputs)}
    if not tied:
        added[OUTPUTS] = np.concatenate(outputs)
    return NewWords(tuple(names), added, tuple(weights))


def place_rows(
    words: np.ndarray, rows: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Put new rows behind the tokens of a tokenizer.

    Args:
      words: `[V, d]`, word vectors of the model.
      rows: `[n, d]`, new ones.
      first: id of the first new word.

    Returns:
      `[V, d]`, the words with the new ones among them that have a place there, and
      `[m, d]`, rows that follow, zeros for tokens of the tokenizer without a vector.
    """
    known, width = words.shape
    whole = np.zeros((max(known, first + len(rows)), width), words.dtype)
    whole[:known] = words
    whole[first : first + len(rows)] = rows.astype(words.dtype)
    return whole[:known], whole[known:]


def count_tokens(folder: Path | None) -> int | None:
    """Tokens of the `tokenizer.json` of a folder; None if it has none."""
    if folder is None or not (folder / TOKENIZER_FILE).is_file():
        return None
    return int(_tokenizer(folder).get_vocab_size(with_added_tokens=True))


def add_tokens(folder: Path, names: tuple[str, ...], first: int) -> None:
    """Add special tokens to the `tokenizer.json` of a folder.

    Raises:
      InputError: they do not get the ids from `first` on, because the tokenizer has
        some of them already.
    """
    library, tokenizer = tokenizers_library(), _tokenizer(folder)
    tokenizer.add_special_tokens(
        [library.AddedToken(name, special=True, normalized=False) for name in names]
    )
    for place, name in enumerate(names):
        if tokenizer.token_to_id(name) != first + place:
            raise InputError(
                f"the tokenizer of the checkpoint has a token {name!r} of its own; it "
                "cannot be a new word too: start from a checkpoint without it"
            )
    (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True) + "\n")


def _tokenizer(folder: Path) -> Any:
    return tokenizers_library().Tokenizer.from_file(str(folder / TOKENIZER_FILE))
