"""Text as ids: a byte-level tokenizer that `prepare` trains on the texts of the training split.

Byte pair encoding over UTF-8 bytes (Sennrich et al. 2016; on bytes as in GPT-2, Radford et al. 2019) by the library
`tokenizers` (extra `text`), which is imported when first needed. Every string has tokens, also one of words that no
training text holds: the words of a prompt are known only after the data set is made. Text is normalised first: NFKC,
then lower case, since product texts come in capitals and prompts do not.

Token t of the library has the id `FIRST_KNOWN` + t; id 0 fills up, id 1 never occurs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from tokenrec.data.metadata import checked_file
from tokenrec.data.schema import BYTES, FIRST_KNOWN, MISSING
from tokenrec.errors import InputError
from tokenrec.runtime.files import write_text_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"


def tokenizers_library() -> ModuleType:
    """The module `tokenizers`.

    Raises:
      InputError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(
            "a text feature needs the package tokenizers, which is not installed; run `pip install tokenrec[text]`"
        ) from error
    return tokenizers


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A tokenizer of at most `vocabulary` tokens, the 256 bytes among them; the same texts give the same one.

    Few or short texts give fewer tokens, no text gives the bytes alone.

    Raises:
      InputError: `vocabulary` is below 256, or the library is not installed.
    """
    if vocabulary < BYTES:
        raise InputError(
            f"vocabulary={vocabulary} is below {BYTES}, the number of bytes; make it larger"
        )
    lib = tokenizers_library()
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.normalizer = lib.normalizers.Sequence(
        [lib.normalizers.NFKC(), lib.normalizers.Lowercase()]
    )
    # The space in front makes a word one token wherever it stands.
    tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = lib.decoders.ByteLevel()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(lib.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    return tokenizer


def table_rows(tokenizer: Tokenizer) -> int:
    """Rows of the table of all texts: the reserved ids, then the tokens."""
    return FIRST_KNOWN + tokenizer.get_vocab_size()


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> Path:
    """Writes `tokenizer.json`, whole or not at all; returns its path."""
    path = Path(directory) / TOKENIZER_FILE
    write_text_atomically(path, tokenizer.to_str(pretty=True) + "\n")
    return path


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a prepared data set.

    Raises:
      InputError: the data set has none, its file is damaged, or the library is not installed.
    """
    path = checked_file(directory, TOKENIZER_FILE)
    if path is None:
        raise InputError(
            f"data '{directory}' has no tokenizer (no {TOKENIZER_FILE}), because its schema has no text feature; add a "
            f'user or item feature of kind "text" to the schema and prepare it again'
        )
    library = tokenizers_library()
    try:
        return library.Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # the library raises no finer one
        raise InputError(
            f"data: cannot read '{path}': {error}; prepare the data set again"
        ) from error


def encode_text(
    tokenizer: Tokenizer, text: str, length: int | None = None
) -> np.ndarray:
    """Ids of one text: `[length] int32`, cut at the right end or filled up with 0; without a length all of its tokens.

    Raises:
      InputError: `text` is no valid Unicode text.
    """
    try:
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
    except TypeError as error:
        raise InputError(
            f"text {text!r} is no Unicode string: {error}; correct it"
        ) from error
    ids = np.full(len(tokens) if length is None else length, MISSING, np.int32)
    kept = tokens[: len(ids)]
    ids[: len(kept)] = np.array(kept, np.int32) + FIRST_KNOWN
    return ids


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str | None], length: int
) -> np.ndarray:
    """Ids of many texts: `[n, length] int32`, as by `encode_text`; all 0 where None."""
    present = [i for i, text in enumerate(texts) if text is not None]
    encoded = tokenizer.encode_batch_fast(
        [texts[i] for i in present], add_special_tokens=False
    )
    ids = np.full((len(texts), length), MISSING, np.int32)
    for i, encoding in zip(present, encoded, strict=True):
        kept = encoding.ids[:length]
        ids[i, : len(kept)] = np.array(kept, np.int32) + FIRST_KNOWN
    return ids


def decode(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """The normalised text behind `ids: [n]`, without the space in front; a cut inside a character shows as U+FFFD."""
    known = [int(i) - FIRST_KNOWN for i in ids if i >= FIRST_KNOWN]
    return tokenizer.decode(known, skip_special_tokens=False).removeprefix(" ")
