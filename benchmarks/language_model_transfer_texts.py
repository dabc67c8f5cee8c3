"""Texts and data sets of `benchmarks/language_model_transfer.py`.

A language model is trained on two kinds of text, and reads nothing of who bought what:

- *items*: the titles of Complete Journey's products, and texts written of the attribute
  numbers of Amazon's items, `beauty 17 18 19`, each distinct text `REPEATS` times;
- *prose*: the docstrings of installed packages that tokenrec itself needs, under
  licences that allow it (`PROSE`).

Both data sets are prepared with the tokenizer that is trained on these texts.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import FIRST_KNOWN, Feature, Schema
from tokenrec.data.source import Source
from tokenrec.data.sources.amazon import AmazonSource
from tokenrec.data.sources.complete_journey import CompleteJourneySource
from tokenrec.data.tokenizer import encode_text, save_tokenizer, train_tokenizer
from tokenrec.semantic_ids.build import build_semantic_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WORDS = 8192
# Packages whose docstrings are read: NumPy is BSD-3-Clause, the others Apache-2.0.
PROSE = ("numpy", "jax", "flax", "optax", "pyarrow")
# Shorter docstrings say little more than the name of a function.
SHORTEST = 200
REPEATS = 3
# The most words of prose to train on.
PROSE_WORDS = 500_000
# Of the distinct item texts and of the docstrings, one in this many is held out.
HELD_OUT = 20
# Words that a text of a Beauty item keeps: its name, and up to 6 attributes.
BEAUTY_LENGTH = 8


class AmazonTexts(AmazonSource):
    """Amazon's items with a text made of their attribute numbers.

    Args:
      root: folder of the files.
      name: name of the data, such as `Beauty`.
    """

    def __init__(self, root: Path, name: str) -> None:
        super().__init__(root, name)
        self._name = name
        title = Feature("title", "text", "item", length=BEAUTY_LENGTH, codes=WORDS)
        self.schema = Schema((*self.schema.features, title), ())

    def items(self) -> pa.Table:
        """Return the items of `AmazonSource` and their texts."""
        table = super().items()
        titles = [
            None if numbers is None else " ".join([self._name, *map(str, numbers)])
            for numbers in table["attributes"].to_pylist()
        ]
        return table.append_column("title", pa.array(titles, pa.string()))


def sources(amazon: Path, tasks: Sequence[str]) -> dict[str, Source]:
    """The data sets of tasks.

    Args:
      amazon: folder of Amazon's files.
      tasks: `beauty`, `complete_journey` or both.
    """
    makers: dict[str, Callable[[], Source]] = {
        "beauty": lambda: AmazonTexts(amazon, "Beauty"),
        "complete_journey": CompleteJourneySource,
    }
    return {task: makers[task]() for task in tasks}


def item_texts(source: Source) -> list[str]:
    """The distinct texts of a source's items, sorted."""
    return sorted({title for title in source.items()["title"].to_pylist() if title})


def docstrings(packages: tuple[str, ...]) -> list[str]:
    """The longer docstrings of installed packages, in the order of their files."""
    found: dict[str, None] = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None, package
        assert spec.origin is not None, package
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            if "tests" not in path.parts:
                found |= dict.fromkeys(_docstrings_of(path))
    return list(found)


def _docstrings_of(path: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text and len(text) >= SHORTEST:
            yield text


class Corpus(NamedTuple):
    """Words of the language model, a row `[n, length] int32` being a packed text.

    Attributes:
      train: rows to train on, shuffled.
      held_out: kind of text -> rows that are not trained on.
      words: kind of text -> words of the training rows.
    """

    train: np.ndarray
    held_out: dict[str, np.ndarray]
    words: dict[str, int]


def make_corpus(
    tokenizer: Tokenizer, texts: dict[str, list[str]], length: int
) -> Corpus:
    """Encode and pack texts.

    Args:
      tokenizer: tokenizer of the language model.
      texts: kind -> its texts. Each text of "prose" is used once, others `REPEATS`
        times.
      length: words of a row.
    """
    random = np.random.default_rng(0)
    end = encode_text(tokenizer, "\n")[-1:]
    parts, held_out, words = [], {}, {}
    for kind, given in texts.items():
        encoded = [np.append(encode_text(tokenizer, text), end) for text in given]
        order = random.permutation(len(encoded))
        apart = -(-len(encoded) // HELD_OUT)
        held_out[kind] = _pack([encoded[i] for i in order[:apart]], length)
        kept = order[apart:]
        repeats = 1 if kind == "prose" else REPEATS
        orders = [random.permutation(kept) for _ in range(repeats)]
        rows = _pack([encoded[i] for i in np.concatenate(orders)], length)
        if kind == "prose":
            rows = rows[: PROSE_WORDS // length]
        parts.append(rows)
        words[kind] = rows.size
    train = np.concatenate(parts)
    return Corpus(random.permutation(train), held_out, words)


def _pack(encoded: list[np.ndarray], length: int) -> np.ndarray:
    stream = np.concatenate(encoded)
    return stream[: len(stream) // length * length].reshape(-1, length) - FIRST_KNOWN


def train_words(texts: dict[str, list[str]], folder: Path, words: int) -> Tokenizer:
    """Train the tokenizer of all texts and write it to `folder`."""
    tokenizer = train_tokenizer((t for given in texts.values() for t in given), words)
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    return tokenizer


def prepare_data(
    amazon: Path, tasks: Sequence[str], work: Path, tokenizer: Path
) -> None:
    """Prepare the data sets, and the semantic ids of Beauty, where they are missing.

    Args:
      amazon: folder of Amazon's files.
      tasks: names of the tasks.
      work: folder of the data sets.
      tokenizer: folder of the language model.
    """
    for name, source in sources(amazon, tasks).items():
        if not (work / name).is_dir():
            prepare(source, work / name, tokenizer=tokenizer)
    if "beauty" in tasks and not (work / "beauty_ids").is_dir():
        # Two levels and one that tells items apart: few words to generate.
        build_semantic_ids(work / "beauty", work / "beauty_ids", levels=2)
