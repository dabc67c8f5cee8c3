"""Small tokenizers in the forms of pretrained language models, for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tokenrec.data.tokenizer import TOKENIZER_FILE

CONTROL = ("<bos>", "<start_of_turn>", "<end_of_turn>")
TEXTS = ["green tea bags", "black tea", "Which of these is next?"] * 5


def byte_level(control: Sequence[str] = CONTROL) -> Tokenizer:
    """A tokenizer as of Qwen 3 and Llama 3: no normalisation, no space in front.

    It has what a model needs and a data set must not use: texts are cut and filled up,
    and begin with the first control token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(control),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{control[0]} $A", special_tokens=[(control[0], 0)]
    )
    return tokenizer


def with_gap() -> tuple[Tokenizer, int]:
    """`byte_level` whose last control token has a number far behind the others.

    Returns:
      The tokenizer, and that number.
    """
    tokenizer = byte_level()
    value: dict[str, Any] = json.loads(tokenizer.to_str())
    moved, highest = value["added_tokens"][-1], tokenizer.get_vocab_size() + 40
    assert moved["content"] == CONTROL[-1]
    moved["id"] = value["model"]["vocab"][CONTROL[-1]] = highest
    return Tokenizer.from_str(json.dumps(value)), highest


def metaspace() -> Tokenizer:
    """A tokenizer whose decoder takes the space away that stands before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(TEXTS, _trainer())
    return tokenizer


def replaced_spaces() -> Tokenizer:
    """A tokenizer as of Gemma 3: spaces are a letter, and none is put in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.train_from_iterator(TEXTS, _trainer())
    return tokenizer


def write_model(folder: Path, tokenizer: Tokenizer | None = None) -> Path:
    """Write `tokenizer.json` as the folder of a model holds it; return the folder."""
    folder.mkdir(parents=True)
    file = folder / TOKENIZER_FILE
    # Not laid out as tokenrec writes it: the file must be kept as it is.
    file.write_text((tokenizer or byte_level()).to_str(pretty=False))
    return folder


def _trainer() -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=60, special_tokens=list(CONTROL), show_progress=False
    )
