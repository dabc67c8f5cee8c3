"""Tokenize text features with a byte-level tokenizer, trained on the training split.

Byte pair encoding (Sennrich et al. 2016) over UTF-8 bytes, as in GPT-2 (Radford et al.
2019), by the library `tokenizers` (extra `text`), which is imported when first needed.
Since every byte is a token, every string can be encoded, also one with words that no
training text holds: the words of a prompt are known only after the data set is made.

Texts are normalised first, to NFKC and then to lower case, because product texts come
in capitals and prompts do not.

Token t of the library has the id `FIRST_KNOWN + t`. Id 0 fills up, and id 1 does not
occur.
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
from tokenrec.runtime.files import read_with_retries, write_text_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"


def tokenizers_library() -> ModuleType:
    """Import the module `tokenizers`.

    Raises:
      InputError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(
            "a text feature needs the package tokenizers, which is not installed; run "
            '`pip install ".[text]"` in a clone of tokenrec, or `pip install '
            "tokenizers`"
        ) from error
    return tokenizers


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a tokenizer; the same texts give the same one, in whatever order.

    Args:
      texts: training texts. Few or short ones give fewer tokens than asked for, none
        give the bytes alone.
      vocabulary: the most tokens, the 256 bytes among them.

    Raises:
      InputError: `vocabulary` is below 256, or the library is not installed.
    """
    if vocabulary < BYTES:
        raise InputError(
            f"vocabulary={vocabulary} is below {BYTES}, the number of bytes; make it "
            "larger"
        )
    lib = tokenizers_library()
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.normalizer = lib.normalizers.Sequence(
        [lib.normalizers.NFKC(), lib.normalizers.Lowercase()]
    )
    # A space before the first word makes a word one token wherever it stands.
    tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = lib.decoders.ByteLevel()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocabulary,
        # Sorted, because the library numbers them in the order given.
        initial_alphabet=sorted(lib.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    return tokenizer


def table_rows(tokenizer: Tokenizer) -> int:
    """Number of rows of the table of all texts: the reserved ids, then the tokens."""
    return FIRST_KNOWN + tokenizer.get_vocab_size()


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> Path:
    """Write `tokenizer.json` atomically, and return its path."""
    path = Path(directory) / TOKENIZER_FILE
    write_text_atomically(path, tokenizer.to_str(pretty=True) + "\n")
    return path


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer of a prepared data set.

    Raises:
      InputError: the data set has none, its file is damaged, or the library is not
        installed.
    """
    path = checked_file(directory, TOKENIZER_FILE)
    if path is None:
        raise InputError(
            f"data '{directory}' has no tokenizer (no {TOKENIZER_FILE}), because its "
            "schema has no text feature; add a user or item feature of kind "
            '"text" to the schema and prepare it again'
        )
    library = tokenizers_library()
    return read_with_retries(
        lambda: library.Tokenizer.from_file(os.fspath(path)),
        path,
        "data:",
        "prepare the data set again",
        damage=(Exception,),  # the library raises no finer one
    )


def encode_text(
    tokenizer: Tokenizer, text: str, length: int | None = None
) -> np.ndarray:
    """Encode one text.

    Args:
      tokenizer: made by `train_tokenizer`.
      text: any Unicode string.
      length: ids to return; longer texts are cut at the right end, shorter ones filled
        up with 0. None: all tokens of the text.

    Returns:
      `[length] int32`.

    Raises:
      InputError: `text` is not valid Unicode.
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
    """Encode many texts, each as by `encode_text`.

    Args:
      tokenizer: made by `train_tokenizer`.
      texts: n texts; None gives ids 0.
      length: ids per text.

    Returns:
      `[n, length] int32`.
    """
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
    """Decode `ids: [n]` to normalised text, without the space before the first word.

    A text that was cut inside a character ends with U+FFFD.
    """
    tokens = [int(i) - FIRST_KNOWN for i in ids if i >= FIRST_KNOWN]
    return tokenizer.decode(tokens, skip_special_tokens=False).removeprefix(" ")
