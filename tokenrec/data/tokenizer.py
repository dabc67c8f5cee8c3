"""Tokenize text features, with a tokenizer that is trained here or that of a model.

The tokenizer of a data set is trained on its training split, or it is the
`tokenizer.json` of a pretrained language model (`prepare --tokenizer`). A trained one is
byte pair encoding (Sennrich et al. 2016) over UTF-8 bytes, as in GPT-2 (Radford et al.
2019). Since every byte is a token, every string can be encoded, also one with words that
no training text holds: the words of a prompt are known only after the data set is made.
Its texts are normalised first, to NFKC and then to lower case, because product texts
come in capitals and prompts do not. The tokenizer of a model has rules of its own.

Both are tokenizers of the library `tokenizers` (extra `text`), which is imported when
first needed. Token t of the library has the id `FIRST_KNOWN + t`. Id 0 fills up, and
id 1 does not occur. Nothing is put before or behind a text, and a control token such as
`<bos>` is one token in the literal texts of a prompt alone: in the texts of the data,
which anybody may have written, its letters are read one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from tokenrec.data.metadata import checked_file
from tokenrec.data.schema import BYTES, FIRST_KNOWN, MISSING
from tokenrec.errors import InputError
from tokenrec.runtime.files import is_file, read_with_retries, write_text_atomically

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
    # Not the number of tokens: the ids of a model's added tokens may leave gaps.
    return FIRST_KNOWN + 1 + max(tokenizer.get_vocab().values(), default=-1)


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> Path:
    """Write `tokenizer.json` atomically, and return its path."""
    path = Path(directory) / TOKENIZER_FILE
    write_text_atomically(path, tokenizer.to_str(pretty=True) + "\n")
    return path


def read_tokenizer(path: Path) -> bytes:
    """Read the tokenizer of a pretrained language model, and check that it is one.

    Args:
      path: a `tokenizer.json`, or the folder that holds one.

    Returns:
      The contents of the file, for `parse_tokenizer`.

    Raises:
      InputError: there is no such file, it is no tokenizer, or the library is not
        installed.
    """
    name, remedy = f"--tokenizer '{path}'", "give the folder of a language model"
    if not path.exists():
        raise InputError(f"{name} does not exist; {remedy}, or its {TOKENIZER_FILE}")
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not is_file(file):
        raise InputError(
            f"{name} is a folder without {TOKENIZER_FILE}; {remedy} that has one, or "
            "write it there with `AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER)` of the library transformers"
        )
    data = read_with_retries(
        file.read_bytes, file, "--tokenizer:", "check the path and its permissions"
    )
    try:
        parse_tokenizer(data)
    except InputError:
        raise
    except Exception as error:  # the library raises no finer one
        raise InputError(
            f"{name}: '{file}' is no tokenizer of the library tokenizers ({error}); "
            f"{remedy} that has a {TOKENIZER_FILE}, or this file itself"
        ) from error
    return data


def parse_tokenizer(data: bytes) -> Tokenizer:
    """Make a tokenizer of the contents of a `tokenizer.json`.

    Its settings for batches of a model, which cut and fill up texts, are switched off.

    Raises:
      InputError: the library is not installed.
      Exception: the library cannot read the contents.
    """
    tokenizer = tokenizers_library().Tokenizer.from_buffer(data)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


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
            '"text" to the schema and prepare it again, or prepare it with --tokenizer '
            "of a language model"
        )
    return read_with_retries(
        lambda: parse_tokenizer(path.read_bytes()),
        path,
        "data:",
        "prepare the data set again",
        damage=(Exception,),  # the library raises no finer one
    )


def encode_text(
    tokenizer: Tokenizer, text: str, length: int | None = None
) -> np.ndarray:
    """Encode one text of the data.

    Args:
      tokenizer: the tokenizer of the data set.
      text: any Unicode string.
      length: ids to return; longer texts are cut at the right end, shorter ones filled
        up with 0. None: all tokens of the text.

    Returns:
      `[length] int32`.

    Raises:
      InputError: `text` is not valid Unicode.
    """
    tokens = _tokens(tokenizer, text, control=False)
    ids = np.full(len(tokens) if length is None else length, MISSING, np.int32)
    kept = tokens[: len(ids)]
    ids[: len(kept)] = np.array(kept, np.int32) + FIRST_KNOWN
    return ids


def encode_literal(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Encode a literal text of a prompt, in which `<bos>` and the like are one token.

    Args:
      tokenizer: the tokenizer of the data set.
      text: any Unicode string of n tokens.

    Returns:
      `[n] int32`.

    Raises:
      InputError: `text` is not valid Unicode.
    """
    return np.array(_tokens(tokenizer, text, control=True), np.int32) + FIRST_KNOWN


def _tokens(tokenizer: Tokenizer, text: str, control: bool) -> list[int]:
    """The library's numbers of the tokens of a text, with control tokens or without."""
    # The library's word for: as if they were ordinary letters.
    tokenizer.encode_special_tokens = not control
    try:
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    except TypeError as error:
        raise InputError(
            f"text {text!r} is no Unicode string: {error}; correct it"
        ) from error
    return tokens


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str | None], length: int
) -> np.ndarray:
    """Encode many texts, each as by `encode_text`.

    Args:
      tokenizer: the tokenizer of the data set.
      texts: n texts; None gives ids 0.
      length: ids per text.

    Returns:
      `[n, length] int32`.
    """
    present = [i for i, text in enumerate(texts) if text is not None]
    tokenizer.encode_special_tokens = True  # as in `_tokens`
    encoded = tokenizer.encode_batch_fast(
        [texts[i] for i in present], add_special_tokens=False
    )
    ids = np.full((len(texts), length), MISSING, np.int32)
    for i, encoding in zip(present, encoded, strict=True):
        kept = encoding.ids[:length]
        ids[i, : len(kept)] = np.array(kept, np.int32) + FIRST_KNOWN
    return ids


def decode(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Decode `ids: [n]` to the text that the tokenizer keeps of a text.

    A text that was cut inside a character ends with U+FFFD.
    """
    tokens = [int(i) - FIRST_KNOWN for i in ids if i >= FIRST_KNOWN]
    text: str = tokenizer.decode(tokens, skip_special_tokens=False)
    if text.startswith(" ") and _adds_space(tokenizer):
        return text[1:]
    return text


def _adds_space(tokenizer: Tokenizer) -> bool:
    """Whether a text begins with a space after decoding that it did not have."""
    # True of a trained tokenizer, and of a few models. Asked of the tokenizer itself:
    # some parts that add a space have a decoder that takes it away.
    letter = tokenizer.encode("a", add_special_tokens=False).ids
    return bool(tokenizer.decode(letter).startswith(" "))
